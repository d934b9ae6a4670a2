"""Qwen3.5-MoE: routed experts and one gated shared expert beside gated delta nets, for Qwen3.5."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3_5MoeTextConfig

from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.qwen2_moe import EMPTY_SHARED, Qwen2MoeHost, gated_experts
from factorllm.hosts.reasons import unmixed
from factorllm.hosts.stored import Stored
from factorllm.recipe import Shape

_SECTIONS = (11, 11, 10)


class Qwen35MoeHost(MoeHost):
    name = "qwen3_5_moe_text"
    families = ("qwen3_5_text",)
    shared = "optional"
    rotates_parts = True
    gates = SOFTMAX_OF_SELECTED
    all_engines = ("transformers", "vllm", "llama.cpp")
    gguf_architecture = "qwen35moe"
    gguf_ffn_norm = "post_attention_norm"
    gguf_ffn: ClassVar = Qwen2MoeHost.gguf_ffn
    gguf_names: ClassVar = {
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.out_proj": "ssm_out",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.dt_bias": "ssm_dt.bias",
        "linear_attn.A_log": "ssm_a",
    }

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Qwen3_5MoeTextConfig(
            **carried(dense, Qwen3_5MoeTextConfig),
            moe_intermediate_size=shape.expert_width,
            shared_expert_intermediate_size=shape.shared_width or EMPTY_SHARED,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            architectures=["Qwen3_5MoeForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return gated_experts(student, self.gates)

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        if config.linear_key_head_dim != config.linear_value_head_dim:
            return "keys and values of delta nets are equally wide"
        return unmixed(config.layer_types)

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
            # Of positions in images; in a text, all are the same.
            "rope.dimension_sections": [*config.rope_parameters.get("mrope_section", _SECTIONS), 0],
        }

    def gguf_ffn_of(self, config: PreTrainedConfig) -> dict[str, Stored]:
        return self.gguf_ffn  # an empty shared expert is one

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        if name == "linear_attn.A_log":
            tensor = -tensor.float().exp()
        elif name.endswith("norm") and name != "linear_attn.norm":
            return tensor.float() + 1  # of a norm that is centred at 0
        return _grouped(name, tensor, config) if name.startswith("linear_attn.") else tensor

    def gguf_columns(self, name: str, config: PreTrainedConfig) -> Tensor | None:
        if name != "ssm_out.weight":
            return None
        columns = torch.arange(config.linear_num_value_heads * config.linear_value_head_dim)
        return _grouped("linear_attn.out_proj", columns[None], config)[0]


def _grouped(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The value heads in the order that llama.cpp has them in: those of one place in all groups together, not those of
    one group."""
    groups, width = config.linear_num_key_heads, config.linear_value_head_dim
    each = config.linear_num_value_heads // groups

    def ordered(part: Tensor, dim: int, rows: int) -> Tensor:
        return part.unflatten(dim, (groups, each, rows)).transpose(dim, dim + 1).flatten(dim, dim + 2)

    match name.removeprefix("linear_attn."):
        case "in_proj_qkv" | "conv1d":
            keys = 2 * config.linear_key_head_dim * groups
            return torch.cat([tensor[:keys], ordered(tensor[keys:], 0, width)])
        case "in_proj_z":
            return ordered(tensor, 0, width)
        case "in_proj_a" | "in_proj_b" | "A_log" | "dt_bias":
            return ordered(tensor, 0, 1)
        case "out_proj":
            return ordered(tensor, 1, width)
        case _:
            return tensor
