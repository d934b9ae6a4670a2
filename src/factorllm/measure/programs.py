"""Programs that a model wrote, each run in a process of its own, with limits.

They are limits for mistakes, and no sandbox against malice: what the user may read and write stays open to a program,
and so does the network. Root's programs are run as nobody, and may read and write what everyone may.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from factorllm.errors import FactorLLMError


@dataclass(frozen=True)
class Limits:
    """Of one program.

    Attributes:
        cpu_seconds: of computing, so that a busy machine decides nothing.
        seconds: on the clock, for what waits.
        memory: bytes of address space.
        file: bytes of each file that it writes.
        files: open at once.
    """

    cpu_seconds: int = 5
    seconds: int = 30
    memory: int = 1 << 30
    file: int = 1 << 20
    files: int = 64


LIMITS = Limits()

# It limits itself, then becomes the program: what is forked from a process of many threads must not run Python first.
# No processes at all, and no threads: neither is asked for, and a bomb of them would take the machine.
_LIMITED = """
import os, resource, sys
cpu, memory, file, files = map(int, sys.argv[1:5])
for name, most in (("CPU", cpu), ("AS", memory), ("FSIZE", file), ("NOFILE", files), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
os.execv(sys.executable, [sys.executable, "-I", "program.py"])
"""

# numpy's BLAS starts threads when it is imported, and gives up where it may not.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

_NOBODY = 65534  # the user and group that Linux has for those who own nothing
_SYSTEM_PYTHON = "/usr/bin/python3"


def passes(program: str, limits: Limits = LIMITS) -> bool:
    """Whether a Python program runs to its end, within the limits.

    Its working directory is a new folder, which is deleted with all that it wrote there; it has no environment, no
    input, and what it prints is thrown away.

    Raises:
        FactorLLMError: when no program can be run here.
    """
    status = secrets.choice(range(64, 120))  # a program that ends itself early does not know which one is success
    folder = Path(tempfile.mkdtemp(prefix="factorllm-program-"))
    try:
        (folder / "program.py").write_text(f'{program}\n__import__("os")._exit({status})\n', encoding="utf-8")
        return _status(folder, limits) == status
    except UnicodeEncodeError:  # half a character is no Python
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _status(folder: Path, limits: Limits) -> int | None:
    """The program's exit status, or None where it was out of time."""
    python, user = runner()
    if user is not None:
        for path in (folder, *folder.iterdir()):
            os.chown(path, user, user)
    numbers = (limits.cpu_seconds, limits.memory, limits.file, limits.files)
    process = subprocess.Popen(
        [python, "-I", "-S", "-c", _LIMITED, *map(str, numbers)],
        cwd=folder,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **({} if user is None else {"user": user, "group": user, "extra_groups": []}),
    )
    try:
        return process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def runner() -> tuple[str, int | None]:
    """The Python that runs programs, and the user that it becomes; None stays who we are.

    Root's processes are not counted by the kernel, and root may write everywhere, so root's programs are nobody's.
    """
    if os.name != "posix" or os.geteuid():
        return sys.executable, None
    return _nobodys_python() or sys.executable, _NOBODY


@cache
def _nobodys_python() -> str | None:
    """A Python that nobody may start: root's own is often in a folder that is closed to others."""
    for python in (sys.executable, _SYSTEM_PYTHON):
        with suppress(OSError, subprocess.SubprocessError):
            command = [python, "-I", "-S", "-c", ""]
            subprocess.run(command, check=True, capture_output=True, user=_NOBODY, group=_NOBODY, extra_groups=[])
            return python
    return None


def check_runner() -> None:
    """Refuse before the work where a right program does not pass, or a wrong one does.

    Raises:
        FactorLLMError: with what to do.
    """
    if os.name != "posix":
        raise FactorLLMError(f"programs are run with the limits of POSIX, which {platform.system()} has not; use Linux")
    try:
        works = passes("assert 1 + 1 == 2") and not passes("assert 1 + 1 == 3")
    except OSError as error:
        raise FactorLLMError(f"programs cannot be run here ({error}); {_INSTEAD}") from None
    if not works:
        raise FactorLLMError(f"a program that is right did not pass here, or a wrong one did; {_INSTEAD}")


_INSTEAD = "run factorllm as a user who is not root, or with a TMPDIR and a Python that every user can reach"


@cache
def deciding() -> dict[str, object]:
    """What decides whether a program passes, besides the program."""
    command = [runner()[0], "-I", "-S", "-c", "import sys; print(sys.version)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return asdict(LIMITS) | {"python": found.stdout.strip()}
