"""Whether a student's files hold the tensors that its config says: all of them, no others, in their shapes."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from factorllm.dense.families import head_dim
from factorllm.dense.ffn import FFN
from factorllm.dense.safetensors import TensorFolder
from factorllm.errors import FactorLLMError
from factorllm.hosts import MoeHost, StudentFFN

Shapes = dict[str, tuple[int, ...]]


def check_layout(tensors: TensorFolder, config: PreTrainedConfig, host: MoeHost) -> None:
    """Refuse a student whose weights and config are not of one model.

    Raises:
        FactorLLMError: naming the first tensor that is missing, of another shape, or left over.
    """
    needed, optional = _outer(config), {}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        needed |= {prefix + name: shape for name, shape in (_attention(config) | _ffn(config, host)).items()}
        optional |= {prefix + name: shape for name, shape in _optional(config).items()}
    have = set(tensors.names())
    if config.tie_word_embeddings:
        have.discard("lm_head.weight")
    if missing := sorted(needed.keys() - have):
        raise _refusal(tensors, f"{missing[0]} is missing")
    if extra := sorted(have - needed.keys() - optional.keys()):
        raise _refusal(tensors, f"{extra[0]} has no place in it and would be left out")
    for name in sorted(have):
        shape, wanted = tensors.shape(name), (needed | optional)[name]
        if shape != wanted:
            raise _refusal(tensors, f"{name} is {shape}, but the config says {wanted}")


def _refusal(tensors: TensorFolder, what: str) -> FactorLLMError:
    return FactorLLMError(f"{tensors.label} does not hold one whole model: {what}; make or fetch the checkpoint again")


def _outer(config: PreTrainedConfig) -> Shapes:
    table = (config.vocab_size, config.hidden_size)
    head = {} if config.tie_word_embeddings else {"lm_head.weight": table}
    return {"model.embed_tokens.weight": table, "model.norm.weight": table[1:], **head}


def _widths(config: PreTrainedConfig) -> dict[str, int]:
    query, key = (count * head_dim(config) for count in (config.num_attention_heads, config.num_key_value_heads))
    return {"q_proj": query, "k_proj": key, "v_proj": key}


def _attention(config: PreTrainedConfig) -> Shapes:
    d, widths = config.hidden_size, _widths(config)
    return {
        **{f"self_attn.{name}.weight": (width, d) for name, width in widths.items()},
        "self_attn.o_proj.weight": (d, widths["q_proj"]),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }


def _optional(config: PreTrainedConfig) -> Shapes:
    """What some students have, and others have not: biases and norms of heads."""
    return {
        **{f"self_attn.{name}.bias": (width,) for name, width in _widths(config).items()},
        "self_attn.o_proj.bias": (config.hidden_size,),
        **{f"self_attn.{name}.weight": (head_dim(config),) for name in ("q_norm", "k_norm")},
    }


def _ffn(config: PreTrainedConfig, host: MoeHost) -> Shapes:
    shape, d = host.shape(config), config.hidden_size
    with torch.device("meta"):
        ffn = FFN(torch.empty(shape.kept_width, d), torch.empty(shape.kept_width, d), torch.empty(d, shape.kept_width))
        student = StudentFFN(ffn, torch.empty(shape.experts, d), shape)
        return {name: tuple(tensor.shape) for name, tensor in host.ffn_tensors(student).items()}
