"""Why a host cannot hold a dense model, each of which several hosts have."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedConfig

from factorllm.dense.families import head_dim, normalises_heads, rope_of, rope_type, sliding_window
from factorllm.recipe import Shape

ALIGNED = 8
"""What widths must be multiples of: rows of 16 bytes in bf16."""


def windowed(config: PreTrainedConfig) -> str | None:
    """The reason against hosts whose attention sees everything before."""
    return "it has no sliding window" if sliding_window(config) else None


def scaled_rope(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that read no parameters of Phi's long RoPE."""
    return "it has no long RoPE" if rope_type(config) == "longrope" else None


def scaled_in_windows(config: PreTrainedConfig) -> str | None:
    """The reason against architectures of llama.cpp that scale positions in layers without a window only."""
    kind = rope_of(config, "sliding_attention").get("rope_type", "default")
    return None if kind == "default" else f"layers with a window have no {kind} RoPE scaling"


def unwindowed(layer_types: Collection[str]) -> str | None:
    """The reason against architectures of llama.cpp that cannot be run where no layer has a window."""
    return None if "sliding_attention" in layer_types else "at least one layer has a window"


def unmixed(layer_types: Collection[str]) -> str | None:
    """The reason against architectures of llama.cpp that cannot be run where all layers keep one kind of state."""
    attending = {"full_attention", "attention"}
    kinds = {kind in attending for kind in layer_types if kind not in ("mlp", "moe")}
    return None if len(kinds) == 2 else "some layers have attention and others have not"


def uneven_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that take the head size from the hidden size."""
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "it needs head_dim = hidden_size / heads"
    return None


def normalised_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that leave queries and keys as they are."""
    return "it does not normalise queries and keys" if normalises_heads(config) else None


def misaligned(config: PreTrainedConfig, shape: Shape) -> str | None:
    """Why the experts' matrices cannot be multiplied by transformers' default back end, or None when they can."""
    for what, width in (("experts", shape.expert_width), ("a hidden size", config.hidden_size)):
        if width % ALIGNED:
            return (
                f"the student would have {what} of {width} neurons, but transformers' grouped_mm needs multiples of "
                f"{ALIGNED}; cut the FFN into fewer parts"
            )
    return None
