"""The process's memory: how much it took, and what the allocator does with what is freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil

from factorllm.errors import FactorLLMError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_REUSED = 32 << 20  # glibc takes no more
_KEPT = 1 << 30


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure is inherited from the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that this machine could still give to a process."""
    return psutil.virtual_memory().available


def require_memory(needed: int, purpose: str, instead: str) -> None:
    """Refuse before the work when this machine plainly has not `needed` bytes, swap space counted: what a system does
    where memory ends is to kill a process, without a word.

    Args:
        purpose: what they are for.

    Raises:
        FactorLLMError: saying how much is needed, and how much is free.
    """
    free = available_memory() + psutil.swap_memory().free
    if needed > free:
        wanted, left = (f"{size / 2**30:.1f} GiB" for size in (needed, free))
        raise FactorLLMError(f"not enough memory: {purpose} take {wanted}, and {left} are free; {instead}")


def give_back_freed_memory() -> None:
    """Give back to the system what malloc kept, where the C library can: before much is needed at once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reuse_freed_memory() -> None:
    """Let malloc keep up to 1 GiB that was freed, in blocks of up to 32 MiB, where the C library can (glibc).

    Otherwise each activation of some megabytes is fetched from the system and given back, page by page, which takes a
    fifth of the conversion's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_REUSED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
