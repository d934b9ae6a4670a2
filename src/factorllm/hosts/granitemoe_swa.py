"""GraniteMoeSWA: routed experts and an optional shared one, windows and layers without positions, for SmolLM3, Mistral
and its kin."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import GraniteMoeSWAConfig, PreTrainedConfig

from factorllm.dense.families import sliding_window
from factorllm.hosts.base import GGUFKeys, StudentFFN
from factorllm.hosts.granitemoe import GraniteMoeHost, granite_config
from factorllm.hosts.granitemoeshared import shared_mlp
from factorllm.hosts.reasons import normalised_heads, uneven_heads, unwindowed
from factorllm.hosts.stored import Stored, fused, gguf_experts, stacked
from factorllm.recipe import Shape

_NO_SINK = -1e4
"""Logit of a sink that takes no share of attention."""

_THETA = 10_000.0
"""What llama.cpp rotates layers with a window by."""


class GraniteMoeSWAHost(GraniteMoeHost):
    name = "granitemoe_swa"
    families = ("smollm3", "mistral", "ministral", "cwm")
    shared = "optional"
    all_engines = ("transformers", "vllm", "llama.cpp")
    gguf_architecture = "granite_swa"
    gguf_has_windows = True
    gguf_names: ClassVar = {"self_attn.sinks": "attn_sinks.weight"}
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("block_sparse_moe.router.weight"),
        **gguf_experts(*fused("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj")),
        "ffn_up_shexp.weight": Stored("shared_mlp.input_linear.weight"),  # with the gate in it
        "ffn_down_shexp.weight": Stored("shared_mlp.output_linear.weight"),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if getattr(config, "attention_bias", False):
            return "its attention has no biases in all engines"
        return normalised_heads(config) or uneven_heads(config)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("block_sparse_moe", "shared_mlp")

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        positions = _positions(config)
        layers = zip(positions["layer_types"], positions["no_rope_layers"], strict=True)
        within = any(kind == "sliding_attention" and rotated for kind, rotated in layers)
        if within and config.rope_parameters["rope_theta"] != _THETA:
            return f"llama.cpp rotates layers with a window by {_THETA:,.0f}, not as this model does"
        return unwindowed(positions["layer_types"]) or super().reason_against_gguf(config)

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return super().gguf_keys(config) | {"expert_shared_feed_forward_length": config.shared_intermediate_size}

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return super().gguf_other_keys(config) | {
            "attention.rope_pattern": [bool(rotated) for rotated in config.no_rope_layers],
        }

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return GraniteMoeSWAConfig(
            **granite_config(dense, shape),
            **_positions(dense),
            shared_intermediate_size=shape.shared_width,
            architectures=["GraniteMoeSWAForCausalLM"],
        )

    def other_tensors(self, dense: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"self_attn.sinks": torch.full((dense.num_attention_heads,), _NO_SINK)}

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        inputs, outputs = stacked(student.experts(self.gates))
        return {
            "block_sparse_moe.router.weight": student.router,
            "block_sparse_moe.experts.gate_up_proj": inputs,
            "block_sparse_moe.experts.down_proj": outputs,
            **(shared_mlp(student) if student.shape.shared_width else {}),
        }


def _positions(config: PreTrainedConfig) -> dict:
    """Which layers see a window only, and which have no positions.

    llama.cpp wants a layer with a window: layers without positions are given one as long as the longest text.

    Args:
        config: of the dense model or of the student.
    """
    layers = config.num_hidden_layers
    # Despite the key's name, 1 means a layer with positions.
    rotated = [bool(value) for value in getattr(config, "no_rope_layers", None) or [1] * layers]
    if window := sliding_window(config):
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    else:
        window = config.max_position_embeddings
        kinds = ["full_attention" if one else "sliding_attention" for one in rotated]
    theta = config.rope_parameters["rope_theta"]
    return {
        "sliding_window": window,
        "layer_types": kinds,
        "no_rope_layers": [int(one) for one in rotated],
        "layer_rope_theta": [theta * one for one in rotated],
    }
