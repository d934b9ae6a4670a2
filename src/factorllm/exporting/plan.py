"""Which type each tensor of a GGUF file takes, and how large it is, before any of them is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from factorllm.dense.families import head_dim
from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import Checkpoint, Layout
from factorllm.exporting.tensors import gguf_tensors
from factorllm.runs.disk import require_space

FILE_TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (Type.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
    "q5_k": (Type.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_S),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_k": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_S),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "iq4_nl": (Type.IQ4_NL, gguf.LlamaFileType.MOSTLY_IQ4_NL),
    "iq4_xs": (Type.IQ4_XS, gguf.LlamaFileType.MOSTLY_IQ4_XS),
    "q3_k": (Type.Q3_K, gguf.LlamaFileType.MOSTLY_Q3_K_S),
}
"""Types by the names that llama.cpp has for them. Its mixtures of K-quants (Q4_K_M) are not among them."""

_INSTEAD = {
    Type.Q6_K: Type.Q8_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q4_K: Type.Q5_0,
    Type.Q3_K: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
}
"""What rows take that are no multiple of 256 but one of 32: the types that llama-quantize takes, but for Q3_K. That is
Q4_0 there, which is as large as IQ4_NL and has the larger error (tests/test_kquants.py)."""

_OUTER = ("token_embd.weight", "output.weight")
_EXACT = (
    "ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d.weight", "ssm_norm.weight", "ssm_a", "ssm_d",
)  # fmt: skip
"""Routers, which are small and decide which experts run; and what llama.cpp takes in fp32 only."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file before it is read.

    Attributes:
        wanted: the type that the file's type means for it.
        kind: the type that it takes.
        size: bytes.
    """

    shape: tuple[int, ...]
    wanted: Type
    kind: Type
    size: int


def check_file_type(file_type: str) -> None:
    """Refuse a type that there is not."""
    if file_type not in list(FILE_TYPES):
        raise FactorLLMError(
            f"no type {file_type!r}; types: {', '.join(FILE_TYPES)}. Files of others are made by llama-quantize, from "
            "the f16 file and the importance-matrix file of factorllm export --text"
        )


def file_types(types: Iterable[str]) -> tuple[str, ...]:
    """Types of several files.

    Raises:
        FactorLLMError: where there is none, or for one that there is not.
    """
    if not isinstance(types, Iterable) or not (found := tuple(types)):
        raise FactorLLMError(f"{types!r} has no types of files; types: {', '.join(FILE_TYPES)}")
    for kind in found:
        check_file_type(kind)
    return found


def plan_tensors(checkpoint: Checkpoint, out: Path, file_type: str, when_full: str) -> dict[str, Planned]:
    """The tensors of the file in their order, from their shapes: so memory stays at one tensor, and the disk at one
    file.

    Raises:
        FactorLLMError: when the disk is too small for them.
    """
    plan = plan_layout(without_data(checkpoint), file_type)
    require_space(out, sum(planned.size for planned in plan.values()), when_full)
    return plan


def plan_layout(model: Layout, file_type: str) -> dict[str, Planned]:
    """The tensors of a file in their order, of a model whose tensors may be without data."""
    plan = {}
    for name, tensor in gguf_tensors(model):
        shape = tuple(tensor.shape)
        wanted = _wanted(name, shape, file_type)
        kind = _fitting(wanted, shape[-1])
        plan[name] = Planned(shape, wanted, kind, _size(shape, kind))
    return plan


def larger(plan: dict[str, Planned]) -> dict[str, str]:
    """Names of tensors that do not take the wanted type, with the type that they take."""
    return {name: planned.kind.name for name, planned in plan.items() if planned.kind is not planned.wanted}


def without_data(checkpoint: Checkpoint) -> Checkpoint:
    """The same, of which only the shapes are read."""
    return replace(checkpoint, read=lambda name: torch.empty(checkpoint.shape(name), device="meta"))


def _size(shape: Sequence[int], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _wanted(name: str, shape: Sequence[int], file_type: str) -> Type:
    wanted = FILE_TYPES[file_type][0]
    if len(shape) == 1 or name.endswith(_EXACT):
        return Type.F32
    return Type.Q8_0 if name in _OUTER and wanted not in (Type.F32, Type.F16, Type.BF16) else wanted


def _fitting(wanted: Type, width: int) -> Type:
    """The type itself, or the next one whose blocks such rows fill."""
    types = (wanted, _INSTEAD.get(wanted, Type.F16), Type.F16)
    return next(kind for kind in types if width % gguf.GGML_QUANT_SIZES[kind][0] == 0)


def fallbacks(checkpoint: Checkpoint, file_type: str) -> list[str]:
    """What cannot be quantised as wanted, from the config alone."""
    wanted = FILE_TYPES[file_type][0]
    shape, config = checkpoint.host.shape(checkpoint.config), checkpoint.config
    heads = head_dim(config) * config.num_attention_heads
    widths = {"the hidden size": config.hidden_size}
    if heads != config.hidden_size:
        widths["the width of all heads"] = heads
    if shape.experts:
        widths |= {"the width of an expert": shape.expert_width, "the width of the shared expert": shape.shared_width}
    else:
        widths["the width of the FFN"] = shape.shared_width
    return [
        f"{what}, {width}, is no multiple of {gguf.GGML_QUANT_SIZES[wanted][0]}: tensors with such rows take "
        f"{_fitting(wanted, width).name.lower()} instead of {file_type}"
        for what, width in widths.items()
        if _fitting(wanted, width) is not wanted
    ]
