"""What is known of each dense family that can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from factorllm.dense.ffn import FFNLayout

_LLAMA = FFNLayout()
_FUSED = FFNLayout(gate="gate_up_proj", up="gate_up_proj")
_LFM2 = FFNLayout("feed_forward", "w1", "w3", "w2")
_UNGATED = FFNLayout(gate=None)
_NEMOTRON_H = FFNLayout("mixer", None, "up_proj", "down_proj")
_GRANITE = FFNLayout("shared_mlp", "input_linear", "input_linear", "output_linear")

_SANDWICHED = "a norm follows its FFN, and hosts with such a norm normalise queries and keys, or values, otherwise"
_NO_POSITIONS = "its FFN has no gate, and attention has no positions in the hosts with such experts"


@dataclass(frozen=True)
class Family:
    """A dense family.

    Attributes:
        models: its well-known models, for messages.
        gguf: its architecture in llama.cpp, where its GGUF files are written or read.
        reads_gguf: whether they are read.
        ffn: where a layer keeps its FFN.
        width: the config's key of the FFN's width.
        norm_follows: whether a norm comes between the FFN and the residual stream.
        kinds: of layers, beside full and sliding attention.
        ffn_kinds: of layers that have an FFN, where the others have none.
        no_host: why no architecture with experts reproduces it, where none does. A static prune needs none.
    """

    models: str
    gguf: str | None = None
    reads_gguf: bool = False
    ffn: FFNLayout = _LLAMA
    width: str = "intermediate_size"
    norm_follows: bool = False
    kinds: tuple[str, ...] = ()
    ffn_kinds: tuple[str, ...] = ()
    no_host: str | None = None


FAMILIES = {
    "llama": Family("Llama 1-3, TinyLlama, SmolLM2, Yi, Falcon 3", "llama", reads_gguf=True),
    "mistral": Family("Mistral", "llama", reads_gguf=True),
    "qwen2": Family("Qwen2, Qwen2.5", "qwen2", reads_gguf=True),
    "qwen3": Family("Qwen3", "qwen3", reads_gguf=True),
    "qwen3_5_text": Family("Qwen3.5, Qwen3.6", "qwen35", kinds=("linear_attention",)),
    "qwen3_vl_text": Family("Qwen3-VL", "qwen3vl"),
    "granite": Family("Granite 3", "granite"),
    "granitemoehybrid": Family(
        "Granite 4 without experts",
        "granitehybrid",
        ffn=_GRANITE,
        width="shared_intermediate_size",
        kinds=("mamba", "attention", "linear_attention"),
    ),
    "phi3": Family("Phi-3, Phi-4, Phi-4-mini", "phi3", ffn=_FUSED),
    "smollm3": Family("SmolLM3", "smollm3"),
    "lfm2": Family("LFM2", "lfm2", ffn=_LFM2, kinds=("conv",)),
    "gemma4_text": Family("Gemma 4", "gemma4", norm_follows=True),
    "ministral": Family("Ministral 8B"),
    "ministral3": Family("Ministral 3", "mistral3"),
    "cwm": Family("Code World Model"),
    "seed_oss": Family("Seed-OSS", "seed_oss"),
    "olmo2": Family("OLMo 2", "olmo2", norm_follows=True),
    "olmo3": Family("OLMo 3", "olmo2", norm_follows=True),
    "cohere": Family("Command-R, Aya", "command-r"),
    "cohere2": Family("Command R7B, Command A", "cohere2"),
    "hunyuan_v1_dense": Family("Hunyuan", "hunyuan-dense"),
    "helium": Family("Helium 1"),
    "ernie4_5": Family("ERNIE 4.5", "ernie4_5"),
    "glm": Family("GLM-4-9B", "chatglm", ffn=_FUSED),
    "glm4": Family("GLM-4-0414", "glm4", ffn=_FUSED, norm_follows=True, no_host=_SANDWICHED),
    "gemma2": Family("Gemma 2", "gemma2", norm_follows=True, no_host=_SANDWICHED),
    "gemma3_text": Family("Gemma 3", "gemma3", reads_gguf=True, norm_follows=True, no_host=_SANDWICHED),
    "exaone4": Family("EXAONE 4", "exaone4", norm_follows=True, no_host=_SANDWICHED),
    "stablelm": Family("StableLM", "stablelm", no_host="its norms have biases, and those of hosts have none"),
    "arcee": Family("Arcee AFM", "arcee", ffn=_UNGATED, no_host=_NO_POSITIONS),
    "nemotron": Family("Nemotron-4, Minitron", "nemotron", ffn=_UNGATED, no_host=_NO_POSITIONS),
    "nemotron_h": Family(
        "Nemotron-H, Nemotron Nano 2",
        "nemotron_h",
        ffn=_NEMOTRON_H,
        kinds=("linear_attention", "mlp"),
        ffn_kinds=("mlp", "moe"),
    ),
    "minicpm3": Family("MiniCPM 3", no_host="its attention is latent (MLA) with multipliers that no host has"),
}
"""Dense families by transformers' `model_type`."""

_QKV = ("q_proj", "k_proj", "v_proj")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

_WITH_BIASES = ("bloom", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2")

OTHERS = {
    **dict.fromkeys(_WITH_BIASES, "its FFN has biases, which belong to all neurons at once"),
    "apertus": "the activation of its FFN has parameters of its own",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv"), "it has no FFN"),
    "bitnet": "a norm inside its FFN reads all neurons at once, so they cannot be told apart",
    "gemma3n": "its layers have several streams (AltUp)",
    "gemma3n_text": "its layers have several streams (AltUp)",
    "mllama": "its layers read the image by cross-attention",
}
"""Families that cannot be read, and why."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a dense model that is read."""
    return FAMILIES[config.model_type]


def is_dense(config: PreTrainedConfig) -> bool:
    """Whether a config is of a dense model that is read. Some families have models with experts too."""
    return config.model_type in FAMILIES and not has_experts(config)


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model is a Mixture of Experts. A key that transformers' class does not know says nothing."""
    if config.model_type == "nemotron_h":  # it says a number whether it has them or not
        return "moe" in config.layers_block_type
    known = type(config)()
    counts = [getattr(config, key) for key in _EXPERT_COUNTS if hasattr(known, key)]
    return any(isinstance(count, int) and count > 1 for count in counts)


def ffn_layers(config: PreTrainedConfig) -> Sequence[int]:
    """The layers that have an FFN, in their order: of most families, all. Of a student those whose FFN was cut.

    Args:
        config: of a dense model or of a student.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or not family.ffn_kinds:
        return range(leading_dense(config), config.num_hidden_layers)
    return [index for index, kind in enumerate(config.layer_types) if kind in family.ffn_kinds]


def leading_dense(config: PreTrainedConfig) -> int:
    """How many of a student's first layers keep their FFN whole."""
    return getattr(config, "first_k_dense_replace", 0)


def activation(config: PreTrainedConfig) -> str:
    """The FFN's activation, by its name in transformers."""
    own = getattr(config, "hidden_activation", None) or getattr(config, "mlp_hidden_act", None)
    return own or getattr(config, "hidden_act", "silu")


def ffn_width(config: PreTrainedConfig) -> int:
    """Neurons of an FFN."""
    width: int = getattr(config, family_of(config).width)
    if getattr(config, "block_auto_adjust_ff_dim", False):  # LFM2 says a width of which two thirds count, rounded up
        width = int((config.block_ffn_dim_multiplier or 1.0) * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def set_ffn_width(config: PreTrainedConfig, width: int) -> None:
    """Change the neurons of an FFN."""
    setattr(config, family_of(config).width, width)
    if hasattr(config, "block_auto_adjust_ff_dim"):
        config.block_auto_adjust_ff_dim = False


def keep_first_layers(config: PreTrainedConfig, count: int) -> None:
    """Leave out all layers but the first."""
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def set_vocabulary(config: PreTrainedConfig, tokens: int) -> None:
    """Say how many tokens there are, of which the embeddings, the output head and their like have a row each."""
    for size in {"vocab_size", "vocab_size_per_layer_input"} & vars(config).keys():
        setattr(config, size, tokens)


def residual_factor(config: PreTrainedConfig) -> float:
    """What an FFN's output is multiplied with before it is added to the residual stream."""
    if config.model_type == "minicpm3":
        return config.scale_depth / math.sqrt(config.num_hidden_layers)
    return getattr(config, "residual_multiplier", 1.0)


def of_layers(config: PreTrainedConfig, kind: str = "full_attention") -> PreTrainedConfig:
    """What a config says of its layers of a kind. Gemma 4 has heads of two widths."""
    return config.per_layer_config[kind] if getattr(config, "is_heterogeneous", False) else config


def head_dim(config: PreTrainedConfig) -> int:
    """The width of a head, in layers with full attention where they differ."""
    return getattr(of_layers(config), "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values, in layers with full attention where they differ."""
    heads: int = of_layers(config).num_key_value_heads
    return heads


def biased_projections(config: PreTrainedConfig) -> tuple[str, ...]:
    """The attention projections that have a bias."""
    if config.model_type == "qwen2":
        return _QKV
    if config.model_type in ("glm", "glm4") or getattr(config, "attention_out_bias", True) is False:
        return _QKV if config.attention_bias else ()
    return ("q_proj", "k_proj", "v_proj", "o_proj") if getattr(config, "attention_bias", False) else ()


def normalises_heads(config: PreTrainedConfig) -> bool:
    """Whether queries and keys are normalised before the rotation."""
    return config.model_type in ("qwen3", "qwen3_5_text", "qwen3_vl_text", "hunyuan_v1_dense", "olmo2", "olmo3")


def rotates(config: PreTrainedConfig) -> bool:
    """Whether attention rotates queries and keys by their positions."""
    return config.model_type != "nemotron_h"


def ropes(config: PreTrainedConfig) -> list:
    """How positions are rotated: as `rope_parameters` says for all layers, or for each kind of them; nothing where
    they are not."""
    if not rotates(config):
        return []
    rope = config.rope_parameters
    of_kinds = isinstance(rope, dict) and rope and all(isinstance(value, dict) for value in rope.values())
    return list(rope.values()) if of_kinds else [rope]


def rope_of(config: PreTrainedConfig, kind: str = "full_attention") -> dict:
    """How positions are rotated in layers of a kind; empty where they are not."""
    rope: dict = config.rope_parameters if rotates(config) else {}
    return rope.get(kind, rope)


def rope_type(config: PreTrainedConfig) -> str:
    """The kind of RoPE scaling: `default`, `linear`, `llama3`, `yarn` ..."""
    return rope_of(config).get("rope_type", "default")


def rotary_share(config: PreTrainedConfig) -> float:
    """The share of each head that is rotated by its position."""
    return rope_of(config).get("partial_rotary_factor") or 1.0


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer with a window sees; None where there is none, or where the model reads no longer texts: hosts
    without windows can hold it then."""
    window = getattr(config, "sliding_window", None)
    of_some = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return None if window and not of_some and window >= config.max_position_embeddings else window
