"""GraniteMoeShared: routed experts and one shared expert, for Llama and Mistral."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig, PreTrainedConfig

from factorllm.dense.families import biased_projections, head_dim
from factorllm.hosts.base import (
    MoeHost,
    Stored,
    StudentFFN,
    common_config,
    gguf_experts,
    gguf_shared,
    normalised_heads,
    stacked,
    uneven_heads,
    windowed,
)
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape


class GraniteMoeSharedHost(MoeHost):
    name = "granitemoeshared"
    families = ("llama", "mistral")
    shared = "always"
    all_engines = ("transformers", "vllm", "llama.cpp")  # SGLang does not know the architecture
    gguf_architecture = "granitemoe"
    gates = SOFTMAX_OF_SELECTED
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("block_sparse_moe.router.layer.weight"),
        **gguf_experts(
            Stored("block_sparse_moe.input_linear.weight", 0),
            Stored("block_sparse_moe.input_linear.weight", 1),
            Stored("block_sparse_moe.output_linear.weight"),
        ),
        **gguf_shared(
            Stored("shared_mlp.input_linear.weight", 0),
            Stored("shared_mlp.input_linear.weight", 1),
            Stored("shared_mlp.output_linear.weight"),
        ),
    }

    def _unfit_engines(self, config: PreTrainedConfig) -> set[str]:
        return {"vllm"} if biased_projections(config) else set()  # it builds no attention biases here

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if biased_projections(config) not in ((), ("q_proj", "k_proj", "v_proj", "o_proj")):
            return "its attention has all four biases or none"
        return windowed(config) or normalised_heads(config) or uneven_heads(config)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("block_sparse_moe", "shared_mlp")

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return GraniteMoeSharedConfig(
            **common_config(dense),
            intermediate_size=shape.expert_width,
            shared_intermediate_size=shape.shared_width,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            attention_bias=bool(biased_projections(dense)),
            # Granite scales what Llama does not; these values turn it into Llama.
            attention_multiplier=head_dim(dense) ** -0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
            architectures=["GraniteMoeSharedForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        shared = student.shared()
        inputs, outputs = stacked(student.experts(self.gates))
        return {
            "block_sparse_moe.router.layer.weight": student.router,
            "block_sparse_moe.input_linear.weight": inputs,
            "block_sparse_moe.output_linear.weight": outputs,
            "shared_mlp.input_linear.weight": torch.cat([shared.gate, shared.up]),
            "shared_mlp.output_linear.weight": shared.down,
        }

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_shared_feed_forward_length": config.shared_intermediate_size,
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            # Embedding and residual scales that are not there cost nothing; scales of 1 are multiplied with.
            "logit_scale": 1.0,
        }
