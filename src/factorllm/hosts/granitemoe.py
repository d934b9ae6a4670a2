"""GraniteMoe: routed experts only, for Granite."""

from typing import ClassVar

from torch import Tensor
from transformers import GraniteMoeConfig, PreTrainedConfig

from factorllm.dense.families import biased_projections, head_dim, residual_factor
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.reasons import normalised_heads, scaled_rope, uneven_heads, windowed
from factorllm.hosts.stored import Stored, fused, gguf_experts, stacked
from factorllm.recipe import Shape


class GraniteMoeHost(MoeHost):
    name = "granitemoe"
    families: tuple[str, ...] = ("granite",)
    shared = "no"
    all_engines: tuple[str, ...] = ("transformers", "vllm", "llama.cpp")  # SGLang does not know the architecture
    gguf_architecture: str | None = "granitemoe"
    gates = SOFTMAX_OF_SELECTED
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("block_sparse_moe.router.layer.weight"),
        **gguf_experts(*fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")),
    }

    def _unfit_engines(self, config: PreTrainedConfig) -> set[str]:
        return {"vllm"} if biased_projections(config) else set()  # it builds no attention biases here

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if biased_projections(config) not in ((), ("q_proj", "k_proj", "v_proj", "o_proj")):
            return "its attention has all four biases or none"
        return windowed(config) or normalised_heads(config) or uneven_heads(config) or scaled_rope(config)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("block_sparse_moe",)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return GraniteMoeConfig(**granite_config(dense, shape), architectures=["GraniteMoeForCausalLM"])

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        inputs, outputs = stacked(student.experts(self.gates))
        return {
            "block_sparse_moe.router.layer.weight": student.router,
            "block_sparse_moe.input_linear.weight": inputs,
            "block_sparse_moe.output_linear.weight": outputs,
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
        }

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return _gguf_scales(config)


def granite_config(dense: PreTrainedConfig, shape: Shape) -> dict:
    """What the configs of all Granite hosts say."""
    return {
        **common_config(dense),
        "intermediate_size": shape.expert_width,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "attention_bias": bool(biased_projections(dense)),
        # Granite scales what Llama does not; these values turn it into Llama.
        "attention_multiplier": getattr(dense, "attention_multiplier", head_dim(dense) ** -0.5),
        "embedding_multiplier": getattr(dense, "embedding_multiplier", 1.0),
        "residual_multiplier": residual_factor(dense),
        "logits_scaling": getattr(dense, "logits_scaling", 1.0),
    }


def _gguf_scales(config: PreTrainedConfig) -> GGUFKeys:
    """The keys of Granite's scales. Those that are not there cost nothing; scales of 1 are multiplied with."""
    scales = {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
    }
    neutral = {"attention.scale": head_dim(config) ** -0.5}
    said: GGUFKeys = {key: float(value) for key, value in scales.items() if value != neutral.get(key, 1.0)}
    return said | {"logit_scale": float(config.logits_scaling)}
