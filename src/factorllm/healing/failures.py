"""What a healing can fail of: one table, in order, that names a failure and says what to do (after the taxonomy of the
Acme study, arXiv 2403.07648, table 3)."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from factorllm.errors import DISK_FULL, FactorLLMError, one_line
from factorllm.runs.disk import GOES_ON, SAYS_FULL

_TRANSIENT = (
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO,
)  # fmt: skip

RETRIES = 3
WAIT_SECONDS = 5.0
"""Before the first retry; twice as long before each next one."""

Result = TypeVar("Result")


class RestartableError(FactorLLMError):
    """A refusal of a run that may go on well when it is started again."""

    exit_code = os.EX_TEMPFAIL


@dataclass(frozen=True)
class Rule:
    """One kind of failure.

    Attributes:
        pattern: a regular expression on what `described` says.
        name: the kind, for people.
        action: `retry`, for it may pass; `restart`, for it may not come again in new processes; `stop`, in one line;
            `fault`, for it is none of the user's.
        hint: what to do, after "NAME (reason); ".
    """

    pattern: str
    name: str
    action: Literal["retry", "restart", "stop", "fault"]
    hint: str


def _numbers(numbers: tuple[int, ...], *words: str) -> str:
    """A pattern for numbers of errors, as the system or a library says them."""
    known = "|".join(map(str, numbers))
    return "|".join([rf"\[errno ({known})\]", rf"os error ({known})\b", *map(re.escape, words)])


_REPEAT = "repeat the command: it goes on from the last checkpoint"

RULES = (
    Rule(_numbers(DISK_FULL, *SAYS_FULL), "no space left on a disk", "stop", GOES_ON),
    Rule(
        r"SIGBUS|Bus error|signal 7\b|exitcode: -7\b", "a file in memory could not be read", "stop",
        f"a file was cut short while it was read, or /dev/shm is full: leave it alone or free some, and {_REPEAT}",
    ),
    Rule(
        r"out of memory|OutOfMemory|can't allocate memory|not enough memory|MemoryError|No executable batch size",
        "out of memory", "restart",
        f"{_REPEAT}, with fewer sequences at once where it had several; else add --gradient-checkpointing",
    ),
    Rule(
        r"SIGKILL", "a process was killed", "restart",
        f"the system does that where memory ends: use a smaller --micro-batch, and {_REPEAT}",
    ),
    Rule(
        r"NCCL|gloo|Dist\w*Error|ProcessGroup|Connection (closed|reset) by peer|Broken pipe",
        "another process of the run is gone", "restart",
        f"{_REPEAT}; with --supervise that happens by itself",
    ),
    Rule(
        _numbers(_TRANSIENT), "a disk or a network does not answer", "retry",
        f"it was tried {RETRIES} times more: see to it, and {_REPEAT}",
    ),
    Rule(
        r"same dtype|dtypes? (do not |to )?match|scalar type|not implemented for '(Half|BFloat16|Float8\w*)'",
        "a type of number does not fit", "stop",
        "use --precision float32, and report it if that does not help",
    ),
    Rule(
        r"size mismatch|shapes? .*(cannot|mismatch|invalid)|size of tensor|must match the (existing )?size",
        "shapes of tensors do not fit", "fault",
        "`factorllm doctor` shows versions; please report it",
    ),
    Rule(
        rf"FileNotFoundError|\[errno {errno.ENOENT}\]|os error {errno.ENOENT}\b|No such file", "a file is gone", "stop",
        f"it was there when healing began: put it back, or if it is of the unfinished run, {_REPEAT}",
    ),
    Rule(
        r"JSONDecodeError", "a JSON file of the run is damaged", "stop", "begin anew with --overwrite",
    ),
    Rule(
        r"backend tokenizer|load tokenizer|Tokenizer class", "the tokenizer cannot be used", "stop",
        "mend or download anew the tokenizer of --teacher",
    ),
)  # fmt: skip
"""The first whose pattern is found names the failure."""


def described(error: BaseException) -> str:
    """Types, numbers and messages of an error and of those that it came from."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        said.append(f"{type(cause).__name__}: {cause}" + (f" [errno {number}]" if number else ""))
        cause = cause.__cause__
    return "\n".join(said)


def rule_of(failure: str) -> Rule | None:
    """The rule for what `described` says, or a log; None for what no rule knows."""
    return next((rule for rule in RULES if re.search(rule.pattern, failure)), None)


@contextmanager
def named_failures() -> Iterator[None]:
    """Says what has failed in the block, and what to do.

    Raises:
        FactorLLMError: for what a rule stops at. Faults, and what no rule knows, pass as they are.
    """
    try:
        yield
    except FactorLLMError:
        raise
    except Exception as error:
        rule = rule_of(described(error))
        if rule is None:
            raise
        if rule.action == "fault":
            error.add_note(f"{rule.name}: {rule.hint}")
            raise
        kind = FactorLLMError if rule.action == "stop" else RestartableError
        raise kind(f"{rule.name} ({one_line(error)}); {rule.hint}") from error


def retried(work: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """Do what goes on where it stopped, again after a failure that may pass; three times, and longer apart each time.

    Args:
        say: called with a line for each failure.
    """
    for wait in (WAIT_SECONDS * 2**number for number in range(RETRIES)):
        try:
            return work()
        except Exception as error:
            rule = rule_of(described(error))
            if rule is None or rule.action != "retry":
                raise
            say(f"{rule.name} ({one_line(error)}); trying again in {wait:.0f} s")
        time.sleep(wait)
    return work()
