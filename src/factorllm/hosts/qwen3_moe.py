"""Qwen3-MoE: routed experts only, for Qwen3."""

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3MoeConfig

from factorllm.dense.families import biased_projections, head_dim, normalises_heads
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.reasons import windowed
from factorllm.hosts.stored import Stored, gguf_experts, per_expert, projections
from factorllm.recipe import Shape


class Qwen3MoeHost(MoeHost):
    name = "qwen3_moe"
    families = ("qwen3",)
    shared = "no"
    gguf_architecture = "qwen3moe"
    gates = SOFTMAX_OF_SELECTED
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        **gguf_experts(*projections("mlp.experts.{}")),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if not normalises_heads(config):
            return "it normalises queries and keys"
        if biased_projections(config):
            return "not all of its engines read attention biases"
        return windowed(config)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Qwen3MoeConfig(
            **common_config(dense),
            head_dim=head_dim(dense),
            intermediate_size=shape.ffn_width,
            moe_intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
            use_sliding_window=False,
            architectures=["Qwen3MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {"mlp.gate.weight": student.router, **per_expert(student.experts(self.gates), "mlp.experts")}

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
