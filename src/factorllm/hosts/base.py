"""What a host architecture must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.families import head_dim, normalises_heads
from factorllm.ffn import FFN
from factorllm.hosts.gates import Gates
from factorllm.recipe import Shape

ALL_ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")


@dataclass(frozen=True)
class StudentFFN:
    """A factorised FFN: neurons in the order shared part, expert 0, expert 1, ...

    Attributes:
        ffn: gate and up (kept, d), down (d, kept).
        router: (N, d), or None in a static prune.
        shape: widths.
    """

    ffn: FFN
    router: Tensor | None
    shape: Shape

    def shared(self) -> FFN:
        """The shared expert."""
        return self.ffn.part(self.shape.shared_columns)

    def experts(self, gates: Gates) -> list[FFN]:
        """The routed experts, `down` scaled so that nearly equal gate weights of a host come to 1."""
        scale = gates.scale(self.shape)
        parts = [self.ffn.part(columns) for columns in self.shape.expert_columns()]
        return [FFN(part.gate, part.up, part.down * scale) for part in parts]


class Host(ABC):
    """An architecture of transformers that a student can be written in.

    Attributes:
        name: its `model_type`.
        gguf: its architecture in GGUF files; None means the dense family's own.
        gates: how it makes gate weights; None when it has no experts.
        ties_embeddings: whether its engines let the output head be the embedding table.
    """

    name: str
    gguf: str | None = None
    gates: Gates | None = None
    ties_embeddings: bool = True

    @abstractmethod
    def engines(self, dense: PreTrainedConfig) -> tuple[str, ...]:
        """Engines that load the student of this dense model without custom code."""

    @abstractmethod
    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        """Why this host cannot hold the student exactly, or None when it can."""

    @abstractmethod
    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        """The student's config."""

    @abstractmethod
    def ffn_tensors(self, student: StudentFFN) -> dict[str, Tensor]:
        """The FFN's tensors by their names on disk, without the prefix of the layer."""

    def attention_tensors(self, dense: PreTrainedConfig) -> dict[str, Tensor]:
        """Tensors that the host's attention has and the dense model's has not, without the prefix of the layer."""
        return {}


class MoeHost(Host):
    """A host with routed experts."""

    gates: Gates

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        if shape.experts == 0:
            return "a static prune has no experts"
        return self._reason_against_family(config) or self._reason_against_shape(shape) or _misaligned(config, shape)

    @abstractmethod
    def _reason_against_family(self, config: PreTrainedConfig) -> str | None: ...

    def _reason_against_shape(self, shape: Shape) -> str | None:
        return None


_ALIGNED = 8  # rows of 16 bytes in bf16

_COMMON_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
]  # fmt: skip


def common_config(dense: PreTrainedConfig) -> dict:
    """The part of the dense config that every host spells as Llama does."""
    return {key: getattr(dense, key) for key in _COMMON_KEYS}


def sliding_window(config: PreTrainedConfig) -> int | None:
    return getattr(config, "sliding_window", None)


def uneven_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that take the head size from the hidden size."""
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "it needs head_dim = hidden_size / heads"
    return None


def normalised_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that leave queries and keys as they are."""
    return "it does not normalise queries and keys" if normalises_heads(config) else None


def stacked(experts: list[FFN]) -> tuple[Tensor, Tensor]:
    """All experts as two tensors: gate over up (N, 2 width, d), and down (N, d, width)."""
    return torch.stack([torch.cat([e.gate, e.up]) for e in experts]), torch.stack([e.down for e in experts])


def per_expert(experts: list[FFN], prefix: str) -> dict[str, Tensor]:
    """One expert after the other, as most hosts name them on disk."""
    return {
        f"{prefix}.{i}.{name}_proj.weight": getattr(expert, name)
        for i, expert in enumerate(experts)
        for name in ("gate", "up", "down")
    }


def _misaligned(config: PreTrainedConfig, shape: Shape) -> str | None:
    """Why the experts' matrices cannot be multiplied by transformers' default back end, or None when they can."""
    for what, width in (("experts", shape.expert_width), ("a hidden size", config.hidden_size)):
        if width % _ALIGNED:
            return (
                f"the student would have {what} of {width} neurons, but transformers' grouped_mm needs multiples of "
                f"{_ALIGNED}; cut the FFN into fewer parts"
            )
    return None
