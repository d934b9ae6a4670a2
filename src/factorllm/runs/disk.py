"""Space on disk: asked for before the work, and a full disk said in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from factorllm.errors import DISK_FULL, FactorLLMError

SAYS_FULL = ("os error 28", "os error 122", " requested and ", "PytorchStreamWriter failed", "No space left on device")
"""What libraries say that keep the number of the error to themselves: safetensors, numpy's tofile, torch.save."""

GOES_ON = "free some and repeat the command: it goes on where it stopped"
"""What to do when the disk of a run is full that can be resumed."""

IN_TMPDIR = "free some, or set TMPDIR to a folder with more"
"""The same for files that are there while a command runs."""


@contextmanager
def explain_full_disk(out: Path, instead: str = GOES_ON) -> Iterator[None]:
    """Turn a full disk into a refusal; what is journalled stays, so a run can go on later.

    Args:
        out: what is written, for its disk is the one that is full.
        instead: what to do.

    Raises:
        FactorLLMError: when there is no space left.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise FactorLLMError(f"no space left on the disk of {out}; {instead}") from error


def require_space(out: Path, needed: int, instead: str) -> None:
    """Refuse before the work when the disk of `out` is plainly too small for `needed` bytes.

    Raises:
        FactorLLMError: saying how much is needed, and how much is free.
    """
    free = shutil.disk_usage(nearest_existing(out)).free
    if needed > free:
        raise FactorLLMError(
            f"no space left on the disk of {out}: about {_shown(needed)} are needed, {_shown(free)} are free; {instead}"
        )


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of the folders above it that is there."""
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def _is_full_disk(error: BaseException) -> bool:
    return getattr(error, "errno", None) in DISK_FULL or any(words in str(error) for words in SAYS_FULL)


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
