"""Attention as Llama has it, of families that keep it otherwise."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import head_dim, rotary_share

_QKV = "self_attn.qkv_proj.weight"


def unfused(config: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors beside its FFN, by Llama's names: queries, keys and values apart (Phi-3), and the rotated part
    of each head as two halves instead of pairs (GLM).

    Args:
        tensors: by the family's names, without the prefix of the layer.
    """
    if _QKV in tensors:
        width = head_dim(config)
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        parts = tensors.pop(_QKV).split([count * width for count in heads])
        tensors |= {f"self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    if config.model_type == "glm":
        order = _halves(head_dim(config), rotary_share(config))
        for name in [name for name in tensors if name.startswith(("self_attn.q_proj.", "self_attn.k_proj."))]:
            rows = tensors[name].unflatten(0, (-1, len(order)))
            tensors[name] = rows[:, order].flatten(0, 1)
    return tensors


def _halves(width: int, share: float) -> Tensor:
    """Where each row of a head comes from: the first and then the second of each rotated pair, then the others."""
    rotated = int(width * share)
    pairs = torch.arange(rotated)
    return torch.cat([pairs[::2], pairs[1::2], torch.arange(rotated, width)])
