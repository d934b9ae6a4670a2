"""Refusals: what users meet when something cannot be done. Each says what is wrong, why, and what to do instead."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from pydantic import ValidationError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors of a disk, or a quota, that is full."""

RENAME = "rename it in UTF-8, for some libraries read no other paths"
"""What to do where a model's path is no UTF-8."""


class FactorLLMError(Exception):
    """A refusal with a message meant for the user. The CLI prints it on one line and exits with its code."""

    exit_code = 2


@contextmanager
def refusing(what: object, instead: str) -> Iterator[None]:
    """The one net under calls into other libraries: whatever they raise on bad input becomes a refusal.

    Only calls of another library on the user's input belong into the block, so that a fault of ours keeps its
    traceback. A full disk and an interruption are not the input's fault, and pass.

    Args:
        what: the input, as the user knows it: a path, in most cases.
        instead: what to do, after a semicolon.

    Raises:
        FactorLLMError: "WHAT cannot be used (reason); INSTEAD". Of a file that may not be read, whatever was to be done
            instead, that it is to be let: nothing is known of its content.
    """
    try:
        yield
    except FactorLLMError:
        raise
    except BaseException as error:
        if not _is_of_input(error):
            raise
        remedy = "let it be read" if _is_unreadable(error) else instead
        raise FactorLLMError(f"{what} cannot be used ({one_line(error)}); {remedy}") from error


def refusing_path(path: object) -> AbstractContextManager[None]:
    """As `refusing`, around the first look at a path that a user gave: a name may be too long for any."""
    return refusing(path, "it is no path that can be there: check it")


def check_utf8(path: object, instead: str) -> None:
    """Refuse a path that is no UTF-8: safetensors, tokenizers and llama.cpp take no other.

    Args:
        instead: what to do, after a semicolon.

    Raises:
        FactorLLMError: for such a path.
    """
    if (coding := sys.getfilesystemencoding()) != "utf-8":
        instead = f"set PYTHONUTF8=1, for this Python reads paths as {coding}"
    with refusing(path, instead):
        str(path).encode()


def first_problem(error: ValidationError) -> str:
    """Where the first problem of a file's content is, and what it is."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "as a whole"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def _is_of_input(error: BaseException) -> bool:
    if getattr(error, "errno", None) in DISK_FULL:
        return False
    # Panics of libraries written in Rust (tokenizers, safetensors) are no Exceptions.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _is_unreadable(error: BaseException) -> bool:
    return isinstance(error, PermissionError) and bool(error.filename) and not os.access(error.filename, os.R_OK)


def one_line(error: BaseException) -> str:
    """An error of another library, fit for the middle of a refusal: at most 200 characters."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return " ".join(str(error).split())[:200] or type(error).__name__
