"""ERNIE 4.5-MoE: routed experts and optional shared ones, for ERNIE 4.5."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, PreTrainedConfig

from factorllm.dense.families import head_dim
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.stored import Stored, gguf_experts, gguf_shared, one_expert, per_expert, projections
from factorllm.recipe import Shape


class Ernie45MoeHost(MoeHost):
    name = "ernie4_5_moe"
    families = ("ernie4_5", "helium")
    shared = "optional"
    shares_whole_experts = True
    all_engines = ("transformers", "vllm", "llama.cpp")
    gates = SOFTMAX_OF_SELECTED
    gguf_architecture = "ernie4_5-moe"
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        "exp_probs_b.bias": Stored("mlp.moe_statics.e_score_correction_bias"),
        **gguf_experts(*projections("mlp.experts.{}")),
        **gguf_shared(*projections("mlp.shared_experts")),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        return "its attention has no biases of Helium's" if getattr(config, "attention_bias", False) else None

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
            **(one_expert(shared, "mlp.shared_experts") if shared.width else {}),
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "interleave_moe_layer_step": 1,
            "leading_dense_block_count": 0,
            "expert_count": config.moe_num_experts,
            "expert_used_count": config.moe_k,
            "expert_shared_feed_forward_length": config.moe_num_shared_experts * config.moe_intermediate_size,
        }
