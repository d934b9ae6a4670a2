"""Qwen3.5-MoE: routed experts and one gated shared expert beside gated delta nets, for Qwen3.5."""

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3_5MoeTextConfig

from factorllm.hosts.base import MoeHost, StudentFFN, carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.qwen2_moe import EMPTY_SHARED, gated_experts
from factorllm.recipe import Shape


class Qwen35MoeHost(MoeHost):
    name = "qwen3_5_moe_text"
    families = ("qwen3_5_text",)
    shared = "optional"
    rotates_parts = True
    gates = SOFTMAX_OF_SELECTED
    all_engines = ("transformers", "vllm")
    gguf_architecture = None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Qwen3_5MoeTextConfig(
            **carried(dense, Qwen3_5MoeTextConfig),
            moe_intermediate_size=shape.expert_width,
            shared_expert_intermediate_size=shape.shared_width or EMPTY_SHARED,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            architectures=["Qwen3_5MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return gated_experts(student, self.gates)

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
