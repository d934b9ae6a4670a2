"""Gemma 4 with experts: routed experts only, beside a dense branch that is silenced, for Gemma 4."""

import math

import torch
from torch import Tensor
from transformers import Gemma4TextConfig, PreTrainedConfig

from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN, carried, stacked
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape

_SILENT = 32
"""Neurons, all zero, of the dense branch: llama.cpp quantises in blocks of 32."""

_PRE, _POST = "pre_feedforward_layernorm", "post_feedforward_layernorm"


class Gemma4Host(MoeHost):
    name = "gemma4_text"
    families = ("gemma4_text",)
    shared = "no"
    activation = "gelu_pytorch_tanh"
    all_engines = ("transformers", "vllm")
    gates = SOFTMAX_OF_SELECTED
    gguf_architecture = None

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("mlp", "router", "experts")

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        changed = {
            "intermediate_size": _SILENT,
            "enable_moe_block": True,
            "num_experts": shape.experts,
            "top_k_experts": shape.top_k,
            "moe_intermediate_size": shape.expert_width,
            "architectures": ["Gemma4ForCausalLM"],
        }
        return Gemma4TextConfig(**carried(dense, Gemma4TextConfig) | changed)

    def other_tensors(self, dense: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = tensors[f"{_PRE}.weight"]
        return tensors | {
            # The router norms the stream by itself, and then reads what the FFN does.
            "router.scale": norm * math.sqrt(len(norm)),
            # Of a norm's output, a norm with weight 1 is the same.
            f"{_PRE}_2.weight": norm.clone(),
            f"{_POST}_1.weight": torch.ones_like(norm),
            f"{_POST}_2.weight": torch.ones_like(norm),
        }

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        gate_up, down = stacked(student.experts(self.gates))
        d, router = config.hidden_size, student.router
        return {
            **{f"mlp.{name}_proj.weight": router.new_zeros(_SILENT, d) for name in ("gate", "up")},
            "mlp.down_proj.weight": router.new_zeros(d, _SILENT),
            "router.proj.weight": router,
            "router.scale": router.new_ones(d),
            "router.per_expert_scale": torch.ones_like(router[:, 0]),
            "experts.gate_up_proj": gate_up,
            "experts.down_proj": down,
        }

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
        }
