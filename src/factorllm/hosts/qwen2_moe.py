"""Qwen2-MoE: routed experts and one gated shared expert, for Qwen2, and for Llama with zero biases."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig, Qwen2MoeConfig

from factorllm.dense.families import biased_projections, head_dim, sliding_window
from factorllm.dense.ffn import FFN
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SOFTMAX_OF_ALL, Gates
from factorllm.hosts.reasons import normalised_heads, uneven_heads
from factorllm.hosts.stored import Stored, gguf_experts, gguf_shared, one_expert, per_expert, projections
from factorllm.recipe import Shape

SHARED_GATE = 2.0**-24
"""Every weight of the shared expert's gate, sigmoid(w x) = 1/2. Not zero: llama.cpp computes silu(g) / g. The smallest
number that fp16 holds."""

EMPTY_SHARED = 32
"""Neurons, all zero, of the shared expert of a recipe without one: engines need one, and llama.cpp quantises in blocks
of 32."""

_BIASED = ("q_proj", "k_proj", "v_proj")


class Qwen2MoeHost(MoeHost):
    name = "qwen2_moe"
    families = ("qwen2", "llama", "mistral")
    shared = "optional"
    gguf_architecture = "qwen2moe"
    gates = SOFTMAX_OF_ALL
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        **gguf_experts(*projections("mlp.experts.{}")),
        **gguf_shared(*projections("mlp.shared_expert")),
        "ffn_gate_inp_shexp.weight": Stored("mlp.shared_expert_gate.weight"),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if "o_proj" in biased_projections(config):
            return "its attention output has no bias"
        if sliding_window(config):
            return "its engines do not agree on its sliding window"
        return normalised_heads(config) or uneven_heads(config)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Qwen2MoeConfig(
            **common_config(dense),
            intermediate_size=shape.ffn_width,
            moe_intermediate_size=shape.expert_width,
            shared_expert_intermediate_size=shape.shared_width or EMPTY_SHARED,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=False,
            qkv_bias=True,  # vLLM and SGLang build the biases whatever the config says
            use_sliding_window=False,
            architectures=["Qwen2MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return gated_experts(student, self.gates)

    def other_tensors(self, dense: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if biased_projections(dense):
            return tensors
        heads = (dense.num_attention_heads, dense.num_key_value_heads, dense.num_key_value_heads)
        return tensors | {
            f"self_attn.{name}.bias": torch.zeros(count * head_dim(dense))
            for name, count in zip(_BIASED, heads, strict=True)
        }

    def gguf_ffn_of(self, config: PreTrainedConfig) -> dict[str, Stored]:
        return self.gguf_ffn  # an empty shared expert is one

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }


def gated_experts(student: StudentFFN, gates: Gates) -> dict[str, Tensor]:
    """Routed experts, and a shared one whose gate gives half, as Qwen's hosts name them."""
    shared, router = student.shared(), student.router
    if not shared.width:
        filling = (0, 0, 0, EMPTY_SHARED)
        shared = FFN(pad(shared.gate, filling), pad(shared.up, filling), pad(shared.down, (0, EMPTY_SHARED)))
    return {
        "mlp.gate.weight": router,
        **per_expert(student.experts(gates), "mlp.experts"),
        **one_expert(replace(shared, down=shared.down * 2), "mlp.shared_expert"),
        "mlp.shared_expert_gate.weight": torch.full_like(router[:1], SHARED_GATE),
    }
