"""The tensors of a GGUF file, made one by one from the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from factorllm.dense.families import head_dim, key_value_heads, rope_of
from factorllm.dense.gguf.rope import rope_factors
from factorllm.dense.names import HEAD, embeddings, layer_prefix
from factorllm.exporting.checkpoints import Layout
from factorllm.hosts.stored import Stored

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
}
"""Names of a layer's tensors in GGUF files, without `.weight`, by their names in transformers."""

_INTERLEAVED = ("llama", "granitemoe", "granite_swa", "granitehybrid", "granite", "smollm3", "mistral3", "arcee")
"""Architectures for which llama.cpp wants the rotary halves of queries and keys interleaved."""

_WITH_HEAD = ("qwen2moe", "olmo2", "stablelm", "nemotron")
"""Architectures for which it insists on an output head beside the embeddings."""


def gguf_tensors(checkpoint: Layout) -> Iterator[tuple[str, Tensor]]:
    """Name and content, fp32, of each tensor of the file, in its order."""
    config, read, form = checkpoint.config, checkpoint.read, checkpoint.form
    yield "token_embd.weight", read(embeddings(config)).float()
    norm, target = form.gguf_final_norm
    yield f"{target}.weight", form.gguf_content(norm, read(f"model.{norm}.weight").float(), config)
    if f"model.{norm}.bias" in checkpoint.names:
        yield f"{target}.bias", read(f"model.{norm}.bias").float()
    if not config.tie_word_embeddings:
        yield "output.weight", read(HEAD).float()
    elif checkpoint.host.gguf(config) in _WITH_HEAD:
        yield "output.weight", read(embeddings(config)).float()
    if (factors := rope_factors(rope_of(config), head_dim(config))) is not None:
        yield "rope_freqs.weight", factors.float()
    for layer in range(config.num_hidden_layers):
        for name, tensor in _layer_tensors(checkpoint, layer):
            yield f"blk.{layer}.{name}", tensor.float()


def _layer_tensors(checkpoint: Layout, layer: int) -> Iterator[tuple[str, Tensor]]:
    form, names, prefix = checkpoint.form, checkpoint.names, layer_prefix(layer)
    others = ATTENTION | {"post_attention_layernorm": form.gguf_ffn_norm} | form.gguf_names
    for source, target in others.items():
        if f"{prefix}{source}" in names:
            yield target, form.gguf_content(source, checkpoint.read(f"{prefix}{source}"), checkpoint.config)
        for kind in ("weight", "bias"):
            if f"{prefix}{source}.{kind}" in names:
                tensor = checkpoint.read(f"{prefix}{source}.{kind}")
                if kind == "weight":
                    tensor = form.gguf_content(source, tensor, checkpoint.config)
                yield f"{target}.{kind}", _as_llamacpp_has_it(tensor, source, checkpoint)
    for target, stored in checkpoint.host.gguf_ffn_at(layer, checkpoint.config).items():
        # llama.cpp wants the gate of the shared expert as a vector.
        yield target, _stored(checkpoint, prefix, stored).squeeze(0)


def _stored(checkpoint: Layout, prefix: str, stored: Stored) -> Tensor:
    if "{}" in stored.name:
        count = checkpoint.host.shape(checkpoint.config).experts
        return torch.stack([checkpoint.read(prefix + stored.name.format(expert)) for expert in range(count)])
    tensor = checkpoint.read(prefix + stored.name)
    if stored.transposed:
        tensor = tensor.transpose(-1, -2)
    return tensor if stored.half is None else tensor.chunk(2, dim=-2)[stored.half]


def _as_llamacpp_has_it(tensor: Tensor, source: str, checkpoint: Layout) -> Tensor:
    """Rows of Q or K from two rotary halves a head to pairs, where llama.cpp wants it; and a convolution of each
    channel as a matrix."""
    config = checkpoint.config
    if tensor.dim() == 3:
        return tensor.squeeze(1)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": key_value_heads(config)}
    if source not in heads or checkpoint.host.gguf(config) not in _INTERLEAVED:
        return tensor
    halves = tensor.reshape(heads[source], 2, head_dim(config) // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)
