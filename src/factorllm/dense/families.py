"""What is known of each dense family that can be factorised. All name their tensors as Llama does."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """A dense family.

    Attributes:
        models: its well-known models, for messages.
        gguf: its architecture in GGUF files.
    """

    models: str
    gguf: str


FAMILIES = {
    "llama": Family("Llama 1-3, TinyLlama, SmolLM2", "llama"),
    "mistral": Family("Mistral", "llama"),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2"),
    "qwen3": Family("Qwen3", "qwen3"),
}
"""Dense families by transformers' `model_type`."""


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def biased_projections(config: PreTrainedConfig) -> tuple[str, ...]:
    """The attention projections that have a bias."""
    if config.model_type == "qwen2":
        return ("q_proj", "k_proj", "v_proj")
    return ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()


def normalises_heads(config: PreTrainedConfig) -> bool:
    """Whether queries and keys are normalised before the rotation."""
    return config.model_type == "qwen3"


def rope_type(config: PreTrainedConfig) -> str:
    """The kind of RoPE scaling: `default`, `linear`, `llama3`, `yarn` ..."""
    return config.rope_parameters.get("rope_type", "default")


def sliding_window(config: PreTrainedConfig) -> int | None:
    return getattr(config, "sliding_window", None)
