"""GLM-4-MoE: routed and shared experts, top-k free at serve time, for Qwen3, Qwen2, Llama, Mistral, Phi-3 and
-4, Seed-OSS and GLM-4-9B."""

from typing import ClassVar

import gguf
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, PreTrainedConfig

from factorllm.dense.families import biased_projections, head_dim, normalises_heads, rotary_share
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SIGMOID
from factorllm.hosts.reasons import windowed
from factorllm.hosts.stored import Stored, gguf_experts, gguf_shared, one_expert, per_expert, projections
from factorllm.recipe import Shape


class Glm4MoeHost(MoeHost):
    name = "glm4_moe"
    families = ("qwen3", "qwen2", "llama", "mistral", "phi3", "seed_oss", "glm")
    shared = "always"
    shares_whole_experts = True
    gguf_architecture = "glm4moe"
    gates = SIGMOID
    ties_embeddings = False
    rotates_parts = True
    leads_dense = True
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        "exp_probs_b.bias": Stored("mlp.gate.e_score_correction_bias"),
        **gguf_experts(*projections("mlp.experts.{}")),
        **gguf_shared(*projections("mlp.shared_experts")),
    }
    gguf_ffn_norm = "post_attention_norm"

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if "o_proj" in biased_projections(config):
            return "its attention output has no bias"
        return windowed(config)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        common = common_config(dense)
        common["tie_word_embeddings"] = False
        common["rope_parameters"] = dense.rope_parameters | {"partial_rotary_factor": rotary_share(dense)}
        return Glm4MoeConfig(
            **common,
            head_dim=head_dim(dense),
            attention_bias=bool(biased_projections(dense)),
            use_qk_norm=normalises_heads(dense),
            intermediate_size=shape.ffn_width,
            moe_intermediate_size=shape.expert_width,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            n_shared_experts=shape.shared_width // shape.expert_width,
            first_k_dense_replace=shape.leading_dense,
            num_nextn_predict_layers=0,
            norm_topk_prob=False,
            routed_scaling_factor=2.0,  # gate weights are 2 x sigmoid(logit): 1 for flat routers
            partial_rotary_factor=rotary_share(dense),
            architectures=["Glm4MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {
            "mlp.gate.weight": student.router,
            "mlp.gate.e_score_correction_bias": torch.zeros_like(student.router[:, 0]),
            **per_expert(student.experts(self.gates), "mlp.experts"),
            **one_expert(student.shared(), "mlp.shared_experts"),
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_count": config.n_shared_experts,
            "leading_dense_block_count": config.first_k_dense_replace,
            "nextn_predict_layers": 0,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "expert_weights_norm": False,
            "expert_weights_scale": config.routed_scaling_factor,
        }
