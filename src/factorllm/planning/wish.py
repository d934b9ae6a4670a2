"""What a user wishes: faster by so much, or so much kept, in so much time and memory."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from factorllm.runs.settings import Chosen

_TIME = {"s": 1, "m": 60, "h": 3600}
_MEMORY = {"m": 1 << 20, "g": 1 << 30}


def _amount(units: dict[str, int], example: str) -> BeforeValidator:
    """Reads a number with a unit; a number alone is taken as it is."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*([{''.join(units)}])(?:in|ib|b)?\s*", value, re.IGNORECASE)
        if not found:
            raise ValueError(f"{value!r} is not understood; write it as {example}")
        return float(found[1]) * units[found[2].lower()]

    return BeforeValidator(read)


class Wish(Chosen):
    """What a student is to be. Unknown keys are refused.

    Example:
        >>> Wish(speed=1.3, time="60m").time
        3600.0
    """

    model_config = ConfigDict(allow_inf_nan=False)

    speed: float | None = Field(default=None, gt=1, le=100)
    """Decode so many times as fast as the dense model in the same file type."""
    keep: float | None = Field(default=None, gt=0, le=1)
    """Keep such a share of the dense model's scores, as far as it was measured."""
    time: Annotated[float, _amount(_TIME, "90s, 60m or 2h"), Field(gt=0)] | None = None
    """Time for all of it: 90s, 60m or 2h."""
    memory: Annotated[float, _amount(_MEMORY, "800m or 16g"), Field(gt=0)] | None = None
    """Memory for the file and a conversation of 4096 tokens: 800m or 16g."""
