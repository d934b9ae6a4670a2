"""LFM2-MoE: routed experts only, beside short convolutions, for LFM2."""

from typing import ClassVar

import gguf
import torch
from torch import Tensor
from transformers import Lfm2MoeConfig, PreTrainedConfig

from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SIGMOID_OF_SELECTED
from factorllm.hosts.reasons import uneven_heads, unmixed
from factorllm.hosts.stored import NUMBERED, Stored, gguf_experts, per_expert, projections
from factorllm.recipe import Shape


class Lfm2MoeHost(MoeHost):
    name = "lfm2_moe"
    families = ("lfm2",)
    shared = "no"
    gates = SIGMOID_OF_SELECTED
    ties_in_half = True
    all_engines = ("transformers", "vllm", "llama.cpp")
    gguf_architecture = "lfm2moe"
    gguf_final_norm = ("embedding_norm", "token_embd_norm")
    gguf_names: ClassVar = {
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
    }
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("feed_forward.gate.weight"),
        "exp_probs_b.bias": Stored("feed_forward.expert_bias"),
        **gguf_experts(*projections("feed_forward.experts.{}", NUMBERED)),
    }

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
        return {
            "feed_forward.gate.weight": student.router,
            "feed_forward.expert_bias": torch.zeros_like(student.router[:, 0]),
            **per_expert(student.experts(self.gates), "feed_forward.experts", NUMBERED),
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "leading_dense_block_count": 0,
        }

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        if config.conv_bias:
            return "convolutions have no biases"
        return uneven_heads(config) or unmixed(config.layer_types)

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "attention.layer_norm_rms_epsilon": config.norm_eps,  # whatever keys of other families say
            "shortconv.l_cache": config.conv_L_cache,
            # A layer without heads is a convolution.
            "attention.head_count_kv": [
                0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types
            ],
        }
