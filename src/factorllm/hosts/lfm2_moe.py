"""LFM2-MoE: routed experts only, beside short convolutions, for LFM2."""

import torch
from torch import Tensor
from transformers import Lfm2MoeConfig, PreTrainedConfig

from factorllm.hosts.base import MoeHost, StudentFFN, carried
from factorllm.hosts.gates import SIGMOID_OF_SELECTED
from factorllm.recipe import Shape


class Lfm2MoeHost(MoeHost):
    name = "lfm2_moe"
    families = ("lfm2",)
    shared = "no"
    gates = SIGMOID_OF_SELECTED
    all_engines = ("transformers", "vllm")
    gguf_architecture = None

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("feed_forward",)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Lfm2MoeConfig(
            **carried(dense, Lfm2MoeConfig),
            moe_intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            num_dense_layers=0,
            # llama.cpp normalises whatever the config says, and demands the bias.
            norm_topk_prob=True,
            use_expert_bias=True,
            routed_scaling_factor=1.0,
            architectures=["Lfm2MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        tensors = {
            "feed_forward.gate.weight": student.router,
            "feed_forward.expert_bias": torch.zeros_like(student.router[:, 0]),
        }
        for i, expert in enumerate(student.experts(self.gates)):
            prefix = f"feed_forward.experts.{i}"
            tensors[f"{prefix}.w1.weight"] = expert.gate
            tensors[f"{prefix}.w3.weight"] = expert.up
            tensors[f"{prefix}.w2.weight"] = expert.down
        return tensors

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
