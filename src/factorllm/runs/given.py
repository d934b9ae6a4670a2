"""What a function of the Python API is given: a path as text or as a `Path`, or an id of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import overload


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
