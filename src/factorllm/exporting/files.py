"""GGUF files as outputs: what made them, and that they appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from factorllm.dense.gguf.file import open_gguf
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.output import Kind, workspace_folder
from factorllm.runs.workspace import appear, take

_MAGIC = b"GGUF"
_JOB_KEY = "factorllm.job"
"""The key that says what made a file: JSON."""


def add_job(writer: gguf.GGUFWriter, job: dict[str, Any]) -> None:
    """Say in a file what made it."""
    writer.add_string(_JOB_KEY, json.dumps(job, sort_keys=True))


def unfinished(out: Path) -> Path:
    """The path that a file is written to before it is at `out`.

    Raises:
        FactorLLMError: when something is there that is no GGUF file.
    """
    partial = workspace_folder(out)
    if partial.exists() and partial.stat().st_size and _read_gguf(partial) is None:
        raise FactorLLMError(f"{partial} exists and is no unfinished file of factorllm; move it away")
    return partial


@contextmanager
def publishing(writer: gguf.GGUFWriter, partial: Path, out: Path, when_full: str) -> Iterator[None]:
    """Write what a writer knows of its file; the block writes the tensors, and then the file is at `out`.

    Args:
        partial: the writer's path, of `unfinished`.
        when_full: what to do when the disk is full.

    Raises:
        FactorLLMError: when the file cannot be written, or another process is writing it.
    """
    with refusing(out, "choose another -o"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(out, when_full), partial.open("ab") as lock:
        # Two that write one file would mix their tensors in it, and it would look whole.
        take(lock, partial, "choose another -o")
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            yield
            writer.close()
            appear(partial, out)
        finally:
            partial.unlink(missing_ok=True)


def write_arrays(
    writer: gguf.GGUFWriter, arrays: dict[str, np.ndarray], partial: Path, out: Path, when_full: str
) -> None:
    """Write a file of tensors that are in memory, as they are. Arguments and errors as of `publishing`."""
    for name, data in arrays.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes)
    with publishing(writer, partial, out, when_full):
        for data in arrays.values():
            writer.write_tensor_data(data)


def _read_gguf(path: Path) -> dict[str, Any] | None:
    """What made a GGUF file, under `job` if it was factorllm; None for a file of another kind."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return None
    with suppress(FactorLLMError, ValueError):
        field = open_gguf(path).fields.get(_JOB_KEY)
        return {"job": json.loads(field.contents())} if field else {}
    return {}


GGUF_FILE = Kind("a GGUF file", False, _read_gguf)
