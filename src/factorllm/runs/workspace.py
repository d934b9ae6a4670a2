"""Writing a checkpoint so that a killed run resumes and ends with the same bytes, and half a checkpoint never looks
whole.

Everything is written into a workspace (`output.workspace_folder`). A layer is journalled once its shards and hidden
states are on disk. The last step renames the finished folder to `OUT`, or moves its files there, `config.json` last.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from factorllm.errors import FactorLLMError
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.output import (
    CHECKPOINT,
    INSIDE,
    JOB,
    Kind,
    check_output,
    first_difference,
    is_done,
    is_free,
    is_own,
    read_json,
    workspace_folder,
)
from factorllm.runs.ranks import Ranks

_PUBLISHING = "publishing.json"
"""Names the finished checkpoint and its files, while they are moved into an output folder that was there before."""

_REFUSED_WITH = ("streams", "trimmed")
"""Folders of a conversion that has begun with its first layer, and of a model that was trimmed and is looked over."""

_ELSEWHERE = "choose another output folder"

_CHEAP = ("lock", JOB, f"{JOB}.tmp", "tokens.safetensors", "tokens.tmp")
"""What is there before the first result: a workspace that holds nothing else keeps no work."""

_LAST = "config.json"
"""Without it, nothing takes a folder for a checkpoint."""


class Workspace:
    """The folder of an unfinished run, locked against other processes until its block ends.

    Args:
        out: where the finished checkpoint or file will be, checked by `output.check_output`.
        kind: what it is.
        job: everything that decides the bytes of the result. A run resumes only under an equal job.
        overwrite: replace an `out` that factorllm made, at the very end, and discard an unfinished run of another job.
            An unfinished run of the same job goes on in any case.
        leads: whether this process writes. Another one that shares the work only reads what the leading one has opened.

    Raises:
        FactorLLMError: when another process is at work, or the unfinished run is another job.
    """

    def __init__(self, out: Path, kind: Kind, job: dict, overwrite: bool, leads: bool = True):
        self.out, self._kind, self._overwrite, self._leads = out, kind, overwrite, leads
        self.folder = workspace_folder(out)
        if leads:
            self._open(json.loads(json.dumps(job)))
        self.journal = self._read_journal()

    def _open(self, job: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise FactorLLMError(f"cannot write to {self.folder}: {error.strerror}; choose another -o") from None
        take(self._lock, self.folder, _ELSEWHERE)
        self._check_job(job)

    @property
    def layers_done(self) -> int:
        return len(self.journal)

    def folder_at(self, name: str) -> Path:
        """A folder of the workspace, made if it is not there."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def commit(self, entry: dict) -> None:
        """Journal one finished layer. Its files must be complete."""
        self.journal.append(entry)
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(self, made: Path) -> None:
        """Make the finished folder or file `made` the output, and remove the workspace.

        Args:
            made: in the workspace; it replaces what is at `out`.
        """
        if not self._overwrite and not is_free(self.out):
            raise FactorLLMError(f"{self.out} was made by another process in the meantime; move it away and repeat")
        check_output(self.out, self._kind)
        _follow_umask(made)
        if made.is_dir() and self.out.exists():
            files = sorted(path.name for path in made.iterdir())
            write_json(self.folder / _PUBLISHING, {"made": made.name, "files": files})
            _move_in(made, files, self.out)
        else:
            made.replace(self.out)
        _remove(self.folder)
        self._lock.close()

    def discard(self) -> None:
        """Remove the workspace; nothing is published."""
        _remove(self.folder)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        """Release the lock; the folder stays for a later run if it keeps any work.

        What a refusal leaves before the first layer is done would be refused again, and stands in another try's way.
        """
        if self._leads:
            refused = isinstance(error, FactorLLMError) and not self.journal
            keeps_none = refused and any((self.folder / name).exists() for name in _REFUSED_WITH)
            if self.folder.exists() and (self._is_idle() or keeps_none):
                _remove(self.folder)
            self._lock.close()

    def _is_idle(self) -> bool:
        return not any(path.is_file() and path.name not in _CHEAP for path in self.folder.rglob("*"))

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _check_job(self, job: dict) -> None:
        path = self.folder / JOB
        if path.exists():
            changed = first_difference(read_json(path) or {}, job)
            if changed is None:
                return
            if not self._overwrite and not self._is_idle():
                raise FactorLLMError(
                    f"{self.folder} holds an unfinished run with {changed}; repeat its command to finish it, add "
                    "--overwrite to discard it, or choose another output folder"
                )
            self._clear()
        elif any(path.name not in _CHEAP for path in self.folder.iterdir()):
            raise FactorLLMError(
                f"{self.folder} exists and is no unfinished run; remove it or choose another output folder"
            )
        write_json(path, job)

    def _read_journal(self) -> list[dict]:
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return []
        entries, whole = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # the run was killed while it wrote this line
            entries.append(json.loads(line))
            whole += len(line)
        os.truncate(path, whole)
        return entries


def finish_publishing(out: Path) -> None:
    """Finish moving a checkpoint into `out`, if the process that did so was killed; it was complete before."""
    folder = workspace_folder(out)
    if not os.path.exists(folder / _PUBLISHING):
        return
    with (folder / "lock").open("w") as lock:
        take(lock, folder, _ELSEWHERE)
        if publishing := read_json(folder / _PUBLISHING):
            _move_in(folder / publishing["made"], publishing["files"], out)
            _remove(folder)


def is_done_already(out: Path, job: dict, leads: bool) -> bool:
    """Whether the checkpoint `out` was made by the same job; what a kill just after that left behind is removed.

    Raises:
        FactorLLMError: when it was made by another job.
    """
    if not is_done(out, CHECKPOINT, job):
        return False
    for folder in (out.parent / f"{out.name}.partial", out / INSIDE) if leads else ():
        before = read_json(folder / JOB)
        if before and first_difference(before, job) is None:
            _remove(folder)
    return True


@contextmanager
def open_checkpoint_job(out: Path, job: dict, overwrite: bool, ranks: Ranks) -> Iterator[Workspace | None]:
    """The workspace of a checkpoint, shared by all processes and held while the block runs; None where `out` was made
    by the same job already.

    Raises:
        FactorLLMError: as `Workspace`; and when the disk is full.
    """
    if not overwrite and is_done_already(out, job, ranks.is_main):
        yield None
        return
    with explain_full_disk(out):
        with ranks.main_first():
            work = Workspace(out, CHECKPOINT, job, overwrite, leads=ranks.is_main)
        with work:
            yield work


def _remove(folder: Path) -> None:
    """Remove a workspace; by what goes last, one that is half removed is known."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == JOB):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.rmdir()


def take(lock: IO[Any], what: Path, instead: str) -> None:
    """Take the lock that a file is, for as long as it is open.

    Args:
        what: is written by whoever has it.
        instead: what to do where another process has it.

    Raises:
        FactorLLMError: when another process has it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FactorLLMError(f"another process is writing {what}; wait for it, or {instead}") from None


def _move_in(made: Path, files: list[str], out: Path) -> None:
    """Replace the checkpoint in `out`, which may be none yet, by the `files` of `made`. Repeated, it goes on."""
    if (made / _LAST).exists():
        (out / _LAST).unlink(missing_ok=True)
    for old in out.iterdir():
        if old.name not in files and is_own(old):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in sorted(files, key=lambda name: name == _LAST):
        new, place = made / name, out / name
        if new.exists():
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            new.replace(place)


def _follow_umask(made: Path) -> None:
    """Give files the permissions that others of the user's have: safetensors are written for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (made, *made.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file that appears whole or not at all."""
    partial = path.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    appear(partial, path)


def write_json(path: Path, content: object) -> None:
    """Write JSON to a file that appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(content, encoding="utf-8")
    appear(partial, path)


def write_index(folder: Path) -> None:
    """Write `model.safetensors.index.json` for the shards in the folder."""
    weight_map, size = {}, 0
    for shard in sorted(folder.glob("model-*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                tensor = file.get_slice(name)
                weight_map[name] = shard.name
                size += math.prod(tensor.get_shape()) * _BYTES[tensor.get_dtype()]
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def appear(partial: Path, path: Path) -> None:
    """Give a file that is written its name, its content first: else it may have lost that when the power fails."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
