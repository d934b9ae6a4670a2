"""Where hosts have the matrices of FFNs: by their names in a checkpoint, and by those in GGUF files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorllm.dense.ffn import FFN


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a GGUF file is in the checkpoint.

    Attributes:
        name: the tensor's name on disk, without the prefix of the layer; `{}` stands for each expert, to be stacked.
        half: None for all of it, 0 or 1 for the first or second half of its rows.
        transposed: whether rows and columns of each expert have changed places there.
    """

    name: str
    half: int | None = None
    transposed: bool = False


WHOLE_FFN = {f"ffn_{name}.weight": Stored(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")}

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What most hosts call gate, up and down."""

NUMBERED = ("w1", "w3", "w2")
"""What Mixtral and LFM2-MoE call them."""


def projections(prefix: str, names: tuple[str, str, str] = PROJECTIONS) -> tuple[Stored, Stored, Stored]:
    """Gate, up and down, each a matrix."""
    return tuple(Stored(f"{prefix}.{name}.weight") for name in names)


def fused(gate_up: str, down: str, transposed: bool = False) -> tuple[Stored, Stored, Stored]:
    """Gate, up and down, of which gate and up are one tensor, gate over up."""
    gate, up = (Stored(gate_up, half, transposed) for half in (0, 1))
    return gate, up, Stored(down, None, transposed)


def gguf_experts(gate: Stored, up: Stored, down: Stored) -> dict[str, Stored]:
    return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up, "ffn_down_exps.weight": down}


def gguf_shared(gate: Stored, up: Stored, down: Stored) -> dict[str, Stored]:
    return {"ffn_gate_shexp.weight": gate, "ffn_up_shexp.weight": up, "ffn_down_shexp.weight": down}


def stacked(experts: list[FFN]) -> tuple[Tensor, Tensor]:
    """All experts as two tensors: gate over up (N, 2 width, d), and down (N, d, width)."""
    return torch.stack([torch.cat([e.gate, e.up]) for e in experts]), torch.stack([e.down for e in experts])


def one_expert(ffn: FFN, prefix: str, names: tuple[str, str, str] = PROJECTIONS) -> dict[str, Tensor]:
    """An expert on disk, as most hosts name its matrices, or by other names of gate, up and down."""
    name = dict(zip(("gate", "up", "down"), names, strict=True))
    return {f"{prefix}.{name[which]}.weight": matrix for which, matrix in ffn.matrices.items()}


def per_expert(experts: list[FFN], prefix: str, names: tuple[str, str, str] = PROJECTIONS) -> dict[str, Tensor]:
    """One expert after the other, as most hosts have them on disk."""
    found: dict[str, Tensor] = {}
    for i, expert in enumerate(experts):
        found |= one_expert(expert, f"{prefix}.{i}", names)
    return found
