"""ERNIE 4.5-MoE: routed experts and optional shared ones, for ERNIE 4.5."""

import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, PreTrainedConfig

from factorllm.dense.families import head_dim
from factorllm.hosts.base import MoeHost, StudentFFN, carried, per_expert, shared_expert
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape


class Ernie45MoeHost(MoeHost):
    name = "ernie4_5_moe"
    families = ("ernie4_5",)
    shared = "optional"
    shares_whole_experts = True
    all_engines = ("transformers", "vllm")
    gates = SOFTMAX_OF_SELECTED
    gguf_architecture = None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Ernie4_5_MoeConfig(
            **carried(dense, Ernie4_5_MoeConfig),
            head_dim=head_dim(dense),
            moe_intermediate_size=shape.expert_width,
            moe_num_experts=shape.experts,
            moe_k=shape.top_k,
            moe_num_shared_experts=shape.shared_width // shape.expert_width,
            moe_layer_interval=1,
            moe_layer_start_index=0,
            moe_layer_end_index=dense.num_hidden_layers - 1,
            architectures=["Ernie4_5_MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        shared = student.shared()
        return {
            "mlp.gate.weight": student.router,
            "mlp.moe_statics.e_score_correction_bias": torch.zeros_like(student.router[:, :1].T),
            **per_expert(student.experts(self.gates), "mlp.experts"),
            **(shared_expert(shared, "mlp.shared_experts") if shared.width else {}),
        }

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.moe_num_experts,
            "expert_used_count": config.moe_k,
            "expert_shared_count": config.moe_num_shared_experts,
        }
