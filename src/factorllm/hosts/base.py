"""What a host architecture must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.ffn import FFN
from factorllm.recipe import Shape


@dataclass(frozen=True)
class StudentFFN:
    """A factorised FFN: neurons in the order shared part, expert 0, expert 1, ...

    Attributes:
        ffn: gate and up (kept, d), down (d, kept).
        router: (N, d), or None in a static prune. Gates are the softmax over its top-k logits, times k.
        shape: widths.
    """

    ffn: FFN
    router: Tensor | None
    shape: Shape

    def shared(self) -> FFN:
        """The shared expert."""
        return self.ffn.part(self.shape.shared_columns)

    def experts(self) -> Iterator[FFN]:
        """The routed experts; `down` times k, because the hosts' gate weights sum to 1."""
        for columns in self.shape.expert_columns():
            expert = self.ffn.part(columns)
            yield FFN(expert.gate, expert.up, expert.down * self.shape.top_k)


class Host(ABC):
    """An architecture of transformers that a student can be written in.

    Attributes:
        name: its `model_type`.
    """

    name: str

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


_ALIGNED = 8  # rows of 16 bytes in bf16

_COMMON_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
]  # fmt: skip


def common_config(dense: PreTrainedConfig) -> dict:
    """The part of the dense config that every host spells as Llama does."""
    return {key: getattr(dense, key) for key in _COMMON_KEYS}


def misaligned(config: PreTrainedConfig, shape: Shape) -> str | None:
    """Why the experts' matrices cannot be multiplied by transformers' default back end, or None when they can."""
    for what, width in (("experts", shape.expert_width), ("a hidden size", config.hidden_size)):
        if width % _ALIGNED:
            return (
                f"the student would have {what} of {width} neurons, but transformers' grouped_mm needs multiples of "
                f"{_ALIGNED}; cut the FFN into fewer parts"
            )
    return None


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
