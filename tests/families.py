"""A tiny config of each dense family that is read, with what is odd in it switched on."""

from __future__ import annotations

from conftest import BASE, CONFIGS
from transformers import AutoConfig, Phi3Config, PreTrainedConfig

_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

SPECIAL: dict[str, dict] = {
    "qwen3_5_text": {
        "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True, "mrope_section": [1, 1, 0],
            "partial_rotary_factor": 0.25,
        },
    },
    "qwen3_vl_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True, "mrope_section": [4, 2, 2],
        },
    },
    "granite": {**_GRANITE, "attention_multiplier": 0.11},
    "granitemoehybrid": {
        **_GRANITE, "attention_multiplier": 0.11, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 64, "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": None, "mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 8,
        "mamba_chunk_size": 16,
    },
    "phi3": {**_PARTIAL, "pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"], "intermediate_size": 96, "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 32, "pad_token_id": 0,
    },
    "gemma4_text": {
        **_WINDOW, "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "pad_token_id": 0,
    },
    "ministral": {**_WINDOW, "head_dim": 8, "pad_token_id": 0},
    "cwm": {
        **_WINDOW, "head_dim": 8, "pad_token_id": 0, "rope_parameters": CONFIGS["llama3-rope"].rope_parameters,
    },
    "ministral3": {"head_dim": 16, "rope_parameters": _YARN, "max_position_embeddings": 256},
    "seed_oss": {"head_dim": 16, "pad_token_id": 0},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {**_WINDOW, "pad_token_id": 0},
    "cohere": {"pad_token_id": 0},
    "cohere2": {**_WINDOW, "head_dim": 8, "pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 16, "pad_token_id": 0},
    "helium": {"head_dim": 8, "pad_token_id": 0},
    "ernie4_5": {"head_dim": 16, "pad_token_id": 0},
    "glm": {**_PARTIAL, "head_dim": 16, "pad_token_id": 0},
    "glm4": {**_PARTIAL, "head_dim": 16, "pad_token_id": 0},
    "gemma2": {**_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0},
    "gemma3_text": {**_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0},
    "exaone4": {**_WINDOW, "head_dim": 16, "pad_token_id": 0},
    "stablelm": {"rope_parameters": _PARTIAL["rope_parameters"]},
    "arcee": {"pad_token_id": 0},
    "nemotron": {"head_dim": 8, "pad_token_id": 0},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"], "head_dim": 16,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16,
        "rms_norm_eps": 1e-3,  # real ones say it too, and nothing reads it
    },
    "minicpm3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "pad_token_id": 0,
    },
}  # fmt: skip

TINY: dict[str, PreTrainedConfig] = {
    "llama": CONFIGS["gqa-tied"],
    **{name: CONFIGS[name] for name in ("mistral", "qwen2", "qwen3")},
    **{name: AutoConfig.for_model(name, **BASE | special) for name, special in SPECIAL.items()},
}
"""By `model_type`."""

WHOLE_HEADS = Phi3Config(**BASE, pad_token_id=0)
"""Phi-3 and Phi-4: all of each head is rotated, in Phi-4-mini (`TINY`) a part."""
