"""How answers are sampled by what a GGUF file says, which llama.cpp heeds where a request says nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from gguf import Keys
from transformers import GenerationConfig

KEYS = {
    "temperature": (Keys.General.SAMPLING_TEMP, float),
    "top_k": (Keys.General.SAMPLING_TOP_K, int),
    "top_p": (Keys.General.SAMPLING_TOP_P, float),
    "min_p": (Keys.General.SAMPLING_MIN_P, float),
    "repetition_penalty": (Keys.General.SAMPLING_PENALTY_REPEAT, float),
}
"""Keys and their types by transformers' names."""

_DIGITS = 6  # of what is stored in fp32
_OFF_AT_ZERO = ("top_k", "min_p")  # all else transformers takes above 0 only


def read_sampling(field: Callable[[str], object], config: GenerationConfig) -> None:
    """Put what a file says into a generation config.

    Args:
        field: what a key of the file says; None when it is not there.
    """
    found = {name: field(key) for name, (key, _) in KEYS.items()}
    said = {
        name: round(value, _DIGITS)
        for name, value in found.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and (value > 0 or (value == 0 and name in _OFF_AT_ZERO))
    }
    if "temperature" in said:  # without it llama.cpp's own, or none at all
        said["do_sample"] = True
    config.update(**said)
