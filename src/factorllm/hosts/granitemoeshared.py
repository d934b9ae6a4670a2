"""GraniteMoeShared: routed experts and one shared expert. Gates are the softmax over the selected logits."""

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig, PreTrainedConfig

from factorllm.hosts.base import Host, StudentFFN, common_config, head_dim, misaligned
from factorllm.recipe import Shape


class GraniteMoeSharedHost(Host):
    name = "granitemoeshared"

    def engines(self, dense: PreTrainedConfig) -> tuple[str, ...]:
        if getattr(dense, "attention_bias", False):
            return ("transformers",)  # the others read no attention biases
        return ("transformers", "vllm", "llama.cpp")

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        if shape.experts == 0:
            return "a static prune has no experts"
        if not shape.shared_width:
            return "it always has a shared expert"
        if head_dim(config) * config.num_attention_heads != config.hidden_size:
            return "it needs head_dim = hidden_size / heads"
        if getattr(config, "sliding_window", None):
            return "it has no sliding window"
        return misaligned(config, shape)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return GraniteMoeSharedConfig(
            **common_config(dense),
            intermediate_size=shape.expert_width,
            shared_intermediate_size=shape.shared_width,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            attention_bias=getattr(dense, "attention_bias", False),
            # Granite scales what Llama does not; these values turn it into Llama.
            attention_multiplier=head_dim(dense) ** -0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
            architectures=["GraniteMoeSharedForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN) -> dict[str, Tensor]:
        experts, shared = list(student.experts()), student.shared()
        return {
            "block_sparse_moe.router.layer.weight": student.router,
            "block_sparse_moe.input_linear.weight": torch.stack([torch.cat([e.gate, e.up]) for e in experts]),
            "block_sparse_moe.output_linear.weight": torch.stack([e.down for e in experts]),
            "shared_mlp.input_linear.weight": torch.cat([shared.gate, shared.up]),
            "shared_mlp.output_linear.weight": shared.down,
        }
