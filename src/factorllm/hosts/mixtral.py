"""Mixtral: routed experts only. Gates are the softmax over the selected logits."""

from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from factorllm.hosts.base import Host, StudentFFN, common_config, head_dim, misaligned
from factorllm.recipe import Shape


class MixtralHost(Host):
    name = "mixtral"

    def engines(self, dense: PreTrainedConfig) -> tuple[str, ...]:
        return ("transformers", "vllm", "sglang", "llama.cpp")

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        if shape.experts == 0:
            return "a static prune has no experts"
        if shape.shared_width:
            return "it has no shared expert"
        if getattr(config, "attention_bias", False):
            return "its attention has no biases"
        return misaligned(config, shape)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return MixtralConfig(
            **common_config(dense),
            intermediate_size=shape.expert_width,
            head_dim=head_dim(dense),
            sliding_window=getattr(dense, "sliding_window", None),
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            architectures=["MixtralForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN) -> dict[str, Tensor]:
        tensors = {"block_sparse_moe.gate.weight": student.router}
        for i, expert in enumerate(student.experts()):
            prefix = f"block_sparse_moe.experts.{i}"
            tensors[f"{prefix}.w1.weight"] = expert.gate
            tensors[f"{prefix}.w3.weight"] = expert.up
            tensors[f"{prefix}.w2.weight"] = expert.down
        return tensors
