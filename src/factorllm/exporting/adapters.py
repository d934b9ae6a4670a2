"""A student's adapters as GGUF files that llama.cpp adds to the student's own.

An adapter's B is laid out as the rows of the matrix are that it is added to, so it goes through the same hands: halves
of a fused matrix are parted and rotary halves interleaved as the matrix's are. Where neurons are put in another order
(`grams.py`), the adapter's are too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.files import add_job, unfinished, write_arrays
from factorllm.exporting.grams import Grams
from factorllm.exporting.tensors import gguf_tensors
from factorllm.student.adapters import Adapter, adapter_folders, read_adapter


def adapter_outputs(model: str, out: Path) -> list[Path]:
    """Where the adapters of a student go that is written to `out`: NAME.kind-0.gguf beside NAME.gguf, and so on."""
    folders = adapter_folders(Path(model))
    return [out.with_name(f"{out.name.removesuffix('.gguf')}.kind-{folder.name}.gguf") for folder in folders]


def write_gguf_adapters(
    model: str, checkpoint: Checkpoint, outputs: list[Path], grams: Grams | None, job: dict[str, Any], when_full: str
) -> None:
    """Write them, in fp32.

    Args:
        grams: by which the neurons of the student's own file are put in order; None where they are not.

    Raises:
        FactorLLMError: when llama.cpp has no place for one of its matrices, or a file cannot be written.
    """
    folders = adapter_folders(Path(model))
    for folder, out in zip(folders, outputs, strict=True):
        _write(checkpoint, read_adapter(folder), out, grams, job, when_full)


def _write(
    checkpoint: Checkpoint, adapter: Adapter, out: Path, grams: Grams | None, job: dict[str, Any], when_full: str
) -> None:
    partial = unfinished(out)
    writer = gguf.GGUFWriter(partial, checkpoint.host.gguf(checkpoint.config))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(len(next(iter(adapter.values())).a)))  # that rank: a scale of 1
    add_job(writer, job)
    arrays = {name: tensor.numpy() for name, tensor in _tensors(checkpoint, adapter, grams)}
    write_arrays(writer, arrays, partial, out, when_full)


def _tensors(checkpoint: Checkpoint, adapter: Adapter, grams: Grams | None) -> Iterator[tuple[str, Tensor]]:
    """Name and content of each tensor of the file, fp32."""
    placed = set()
    for module, name, b in _placed(checkpoint, adapter):
        placed.add(module)
        a = adapter[module].a.float()
        if grams:
            a, b = grams.adapter_in_order(name, a, b)
        yield f"{name}.lora_a", a.contiguous()
        yield f"{name}.lora_b", b.contiguous()
    if left := sorted(adapter.keys() - placed):
        raise FactorLLMError(
            f"the adapters cannot be exported: llama.cpp's file of {checkpoint.name} has no tensor that is or holds "
            f"{left[0]}; serve the student with vLLM or transformers"
        )


def _placed(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[tuple[str, str, Tensor]]:
    """Each adapted module, a tensor of the file that is or is part of it, and B as it is laid out there."""
    last = ""

    def read(name: str) -> Tensor:
        nonlocal last
        last = name.removesuffix(".weight")  # each tensor is made of the one that is read just before it
        found = adapter.get(last)
        return found.b if found else torch.empty(checkpoint.shape(name), device="meta")

    for name, tensor in gguf_tensors(replace(checkpoint, read=read)):
        if not tensor.is_meta:
            yield last, name, tensor
