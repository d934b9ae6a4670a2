"""What a function of the Python API is given: a path as text or as a `Path`, an id of the hub, or a count."""

from __future__ import annotations

import operator
import os
from contextlib import suppress
from pathlib import Path
from typing import overload

from factorllm.errors import FactorLLMError


@overload
def given(what: str | Path) -> str: ...
@overload
def given(what: str | Path | None) -> str | None: ...
def given(what: str | Path | None) -> str | None:
    """A model or a text as all that reads it takes it; of a path, `~` is the user's home.

    Example:
        >>> given(Path("models/dense"))
        'models/dense'
    """
    return None if what is None else os.path.expanduser(what)


def given_count(what: str, count: int) -> int:
    """A whole number as Python has it; numpy's and torch's are no JSON.

    Args:
        what: is counted, as messages call it.

    Raises:
        FactorLLMError: for what is none, True and a number as text among it.
    """
    with suppress(TypeError):
        if not isinstance(count, bool):
            return operator.index(count)
    raise FactorLLMError(f"{what} {count!r} is no whole number; give one such as 1000")
