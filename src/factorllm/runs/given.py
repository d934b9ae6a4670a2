"""What a function of the Python API is given: paths as text or as a `Path`, ids of the hub, numbers, and settings."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shown
from typing import TypeVar

from factorllm.errors import FactorLLMError

Kind = TypeVar("Kind")


def given(what: str | Path) -> str:
    """A model or a text as all that reads it takes it; of a path, `~` is the user's home.

    Raises:
        FactorLLMError: for what is neither text nor a path.

    Example:
        >>> given(Path("models/dense"))
        'models/dense'
    """
    if not isinstance(what, str | Path):
        raise FactorLLMError(f"{shown(what)} is neither a path nor a name; give it as text or as a Path")
    return os.path.expanduser(what)


def given_if_any(what: str | Path | None) -> str | None:
    """As `given`; None where there is none."""
    return None if what is None else given(what)


def name_of(path: Path) -> str:
    """The last part of a path, to be written into files: bytes in it that are no UTF-8 could not be."""
    return os.fsencode(path.name).decode(errors="replace")


def given_several(what: str, paths: Sequence[str | Path], least: int = 1) -> list[str]:
    """A list as `given` has each of it; of one path alone, each letter would be one.

    Args:
        what: they are, as messages call it.
        least: how many there must be.

    Raises:
        FactorLLMError: for what is no list of paths, or a shorter one.
    """
    if isinstance(paths, list | tuple) and len(paths) >= least:
        return [given(path) for path in paths]
    raise FactorLLMError(f'{what} is {shown(paths)}, and a list of models is wanted; give one such as ["my-model"]')


def given_settings(settings: Kind | None, default: Kind) -> Kind:
    """Settings, or the default ones where there are none.

    Raises:
        FactorLLMError: for what are no such settings, a dict and those of another function among it.
    """
    if settings is None:
        return default
    if isinstance(settings, type(default)):
        return settings
    name = type(default).__name__
    raise FactorLLMError(f"{shown(settings)} is no {name}; give one, as factorllm.{name}(...), or leave it out")


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


def given_number(what: str, number: float) -> float:
    """A number as Python has it.

    Args:
        what: it is, as messages call it.

    Raises:
        FactorLLMError: for what is none, True and a number as text among it.
    """
    with suppress(TypeError, ValueError):
        if not isinstance(number, bool | str | bytes):
            return float(number)
    raise FactorLLMError(f"{what} {shown(number)} is no number; give one such as 0.5")
