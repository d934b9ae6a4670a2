"""What hosts take over from a dense model's config."""

from __future__ import annotations

from transformers import PreTrainedConfig

_OWN = {"model_type", "architectures", "transformers_version", "dtype"}

_COMMON_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
]  # fmt: skip


def common_config(dense: PreTrainedConfig) -> dict:
    """The part of the dense config that every host spells as Llama does."""
    return {key: getattr(dense, key) for key in _COMMON_KEYS}


def carried(dense: PreTrainedConfig, kind: type[PreTrainedConfig]) -> dict:
    """The part of the dense config that a config of another kind, of the same makers, spells alike."""
    known = kind().to_dict().keys() - _OWN
    return {key: value for key, value in dense.to_dict().items() if key in known}
