"""Writing a checkpoint so that a killed run resumes and ends with the same bytes, and half a checkpoint never looks
whole.

Everything is written into `OUT.partial`. A layer is journalled once its shards and hidden states are on disk. The last
step renames the finished folder to `OUT`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from factorllm.errors import FactorLLMError


class Workspace:
    """The folder of an unfinished run, `OUT.partial`, locked against other processes.

    Args:
        out: where the finished checkpoint will be.
        job: everything that decides the bytes of the result. A run resumes only under an equal job.
        overwrite: replace an `out` that exists, at the very end, and discard an unfinished run of another job. An
            unfinished run of the same job goes on in any case.
        leads: whether this process writes. Another one that shares the work only reads what the leading one has opened.

    Raises:
        FactorLLMError: when `out` exists, another process is at work, or the unfinished run is another job.
    """

    def __init__(self, out: Path, job: dict, overwrite: bool, leads: bool = True):
        self.out, self._overwrite, self._leads = out, overwrite, leads
        self.folder = workspace_folder(out)
        self._replaced = self.folder / "replaced"
        if leads:
            self._open(job)
        self.journal = self._read_journal()

    def _open(self, job: dict) -> None:
        if self._replaced.exists() and not self.out.exists():
            self._replaced.rename(self.out)  # killed between the two renames of publish()
        if not self._overwrite:
            refuse_existing(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise FactorLLMError(f"cannot write to {self.folder}: {error.strerror}; choose another -o") from None
        self._check_job(json.loads(json.dumps(job)))

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

    def publish(self, checkpoint: Path) -> None:
        """Move the finished folder `checkpoint` to `out`, and remove the workspace."""
        if not self._overwrite:
            refuse_existing(self.out)
        if self.out.exists():
            self.out.rename(self._replaced)
        checkpoint.rename(self.out)
        shutil.rmtree(self.folder)
        self._lock.close()

    def discard(self) -> None:
        """Remove the workspace; nothing is published."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Release the lock; the folder stays for a later run."""
        if self._leads:
            self._lock.close()

    def _take_lock(self):
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FactorLLMError(
                f"another process is writing {self.folder}; wait for it, or choose another output folder"
            ) from None
        return lock

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _check_job(self, job: dict) -> None:
        path = self.folder / "job.json"
        if path.exists():
            before = json.loads(path.read_text())
            changed = [key for key in job if before.get(key) != job[key]]
            if not changed:
                return
            if not self._overwrite:
                key = changed[0]
                raise FactorLLMError(
                    f"{self.folder} holds an unfinished run with other {key} ({before.get(key)}, now {job[key]}); "
                    "repeat its command to finish it, add --overwrite to discard it, or choose another output folder"
                )
            self._clear()
        elif any(path.name != "lock" for path in self.folder.iterdir()):
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


def workspace_folder(out: Path) -> Path:
    """The folder of the unfinished run that will become `out`."""
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path) -> None:
    """Refuse to write over a file or a folder that is not empty."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise FactorLLMError(f"{out} exists already; choose another output folder, or add --overwrite to replace it")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file that appears whole or not at all."""
    partial = path.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    _appear(partial, path)


def write_json(path: Path, content: object) -> None:
    """Write JSON to a file that appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(content, encoding="utf-8")
    _appear(partial, path)


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


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into a refusal; what is journalled stays, so the run can go on later."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise FactorLLMError(
            f"no space left on the disk of {folder}; free some and repeat the command: it goes on where it stopped"
        ) from None


_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def _appear(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
