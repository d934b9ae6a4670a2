"""The transformers config of a dense model in a GGUF file, from its keys: as llama.cpp reads them, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from factorllm.dense.config_checks import check_depth
from factorllm.dense.families import FAMILIES
from factorllm.dense.gguf.keys import Keys
from factorllm.dense.gguf.rope import read_rope
from factorllm.errors import FactorLLMError, refusing

_GEMMA3_PATTERN, _GEMMA3_27B = 6, 62  # layers

_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def read_config(
    keys: Keys, family: str, tokens: Mapping[str, int], names: set[str], rope_freqs: Tensor | None
) -> PreTrainedConfig:
    """The config of a dense model.

    Args:
        keys: the file's, below its architecture.
        family: the model's `model_type` in transformers.
        tokens: ids of special tokens and the `vocabulary`'s size, as far as the file says them.
        names: all tensors in the file.
        rope_freqs: what llama3 RoPE scaling divides frequencies by; None when it is not there.

    Raises:
        FactorLLMError: when a key is missing, damaged, or changes the model in a way that is not applied.
    """
    layers = keys.integer("block_count")
    check_depth(keys.label, layers, len(names))
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    if hidden % heads and "attention.key_length" not in keys:
        raise keys.refusal("attention.head_count", heads, f"does not divide the hidden size, {hidden}")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    context = keys.integer("context_length")
    fields = {
        "max_position_embeddings": context,
        "num_hidden_layers": layers,
        "intermediate_size": keys.integer("feed_forward_length"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": keys.integer("vocab_size", tokens.get("vocabulary")),
        "rope_parameters": read_rope(keys, context, rope_freqs, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        **{name: tokens.get(key) for name, key in _SPECIAL.items()},
    }
    if family == "gemma3_text":
        fields |= _gemma3(keys, fields)
    if family == "llama":
        fields["attention_bias"] = any(".attn_" in name and name.endswith(".bias") for name in names)
    if family == "qwen2" and head_dim * heads == hidden:
        del fields["head_dim"]  # Qwen2 has it by itself, and hosts and engines do not expect to be told
    _refuse_others(keys, head_dim, fields.get("sliding_window") or context, context)
    with refusing(keys.label, keys.instead):
        return AutoConfig.for_model(family, **fields)


def _gemma3(keys: Keys, fields: dict) -> dict:
    """What Gemma 3 says beside: windows in five of six layers, which rotate in their own way, and the scale of queries.

    llama.cpp knows the two latter by the architecture.
    """
    layers = fields["num_hidden_layers"]
    windows = [(index + 1) % _GEMMA3_PATTERN != 0 for index in range(layers)]
    keys.refuse_unless("attention.sliding_window_pattern", _GEMMA3_PATTERN, windows)
    if "attention_factor" in fields["rope_parameters"]:  # llama.cpp scales layers with a window by it too
        raise keys.refusal("rope.scaling.attn_factor", keys.number("rope.scaling.attn_factor", 1.0))
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    hidden, heads, head_dim = (fields[name] for name in ("hidden_size", "num_attention_heads", "head_dim"))
    return {
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if within else "full_attention" for within in windows],
        "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B else head_dim,
    }


def _refuse_others(keys: Keys, head_dim: int, window: int, context: int) -> None:
    """Refuse every other key, unless it says what is so in any case."""
    keys.refuse_unless("rope.dimension_count", head_dim)
    keys.refuse_unless("attention.value_length", head_dim)
    keys.refuse_unless("attention.causal", True)
    keys.refuse_unless("expert_count", 0)
    keys.refuse_unless("expert_used_count", 0)
    keys.refuse_unless("tensor_data_layout", "Meta AI original pth")
    if keys.integer("attention.sliding_window", context) < min(window, context):
        raise keys.refusal("attention.sliding_window", keys.integer("attention.sliding_window"))
    keys.refuse_unread()


def family_of_architecture(label: str, architecture: object) -> str:
    """The family, by transformers' `model_type`, of an architecture of GGUF files.

    Raises:
        FactorLLMError: when it is not supported.
    """
    for family, known in FAMILIES.items():
        if known.reads_gguf and known.gguf == architecture:
            return family
    known = ", ".join(sorted({str(known.gguf) for known in FAMILIES.values() if known.reads_gguf}))
    raise FactorLLMError(
        f"{label} is of the architecture {architecture!r}, which is not supported as a GGUF file; supported: {known}"
    )
