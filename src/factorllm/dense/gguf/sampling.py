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
_TAKEN = {
    "temperature": lambda value: value > 0,
    "top_k": lambda value: value >= 0,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0 < value < math.inf,
}
"""What transformers takes. It does not save what is for sampling of a model that is not sampled."""


def read_sampling(field: Callable[[str], object], config: GenerationConfig) -> None:
    """Put what a file says into a generation config.

    Args:
        field: what a key of the file says; None when it is not there.
    """
    found = {name: field(key) for name, (key, _) in KEYS.items()}
    said = {
        name: round(value, _DIGITS)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value) and _TAKEN[name](value)
    }
    penalty = said.pop("repetition_penalty", None)
    if said and ("temperature" in said or found["temperature"] is None):  # else it is 0: the likeliest token
        config.update(do_sample=True, **said)
    if penalty is not None:
        config.repetition_penalty = penalty
