"""Mixtral: routed experts only, for Llama, Mistral, Ministral 3 and Phi-3."""

from typing import ClassVar

from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from factorllm.dense.families import biased_projections, head_dim, sliding_window
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.reasons import normalised_heads, scaled_rope
from factorllm.hosts.stored import NUMBERED, Stored, gguf_experts, per_expert, projections
from factorllm.recipe import Shape


class MixtralHost(MoeHost):
    name = "mixtral"
    families = ("llama", "mistral", "phi3", "ministral3")
    shared = "no"
    gguf_architecture = "llama"
    gates = SOFTMAX_OF_SELECTED
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("block_sparse_moe.gate.weight"),
        **gguf_experts(*projections("block_sparse_moe.experts.{}", NUMBERED)),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if biased_projections(config):
            return "its attention has no biases"
        return normalised_heads(config) or scaled_rope(config)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        common = common_config(dense)
        if dense.model_type == "ministral3":  # beyond, it scales queries by their position, which Mixtral does not
            common["max_position_embeddings"] = dense.rope_parameters["original_max_position_embeddings"]
        return MixtralConfig(
            **common,
            intermediate_size=shape.expert_width,
            head_dim=head_dim(dense),
            sliding_window=sliding_window(dense),
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            architectures=["MixtralForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {
            "block_sparse_moe.gate.weight": student.router,
            **per_expert(student.experts(self.gates), "block_sparse_moe.experts", NUMBERED),
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
