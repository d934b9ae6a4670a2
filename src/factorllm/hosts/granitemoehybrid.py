"""GraniteMoeHybrid: routed experts and one shared expert beside Mamba and attention, for Granite 4 without experts."""

import math
from typing import ClassVar

from torch import Tensor
from transformers import GraniteMoeHybridConfig, PreTrainedConfig

from factorllm.hosts.base import GGUFKeys
from factorllm.hosts.configs import carried
from factorllm.hosts.granitemoeshared import GraniteMoeSharedHost
from factorllm.hosts.mamba import mamba_content, mamba_names
from factorllm.hosts.reasons import unmixed
from factorllm.recipe import Shape

_MAMBA = ("mamba", "linear_attention")
"""As the makers say it, and as transformers saves it."""

_UNBOUNDED = (0.0, math.inf)


class GraniteMoeHybridHost(GraniteMoeSharedHost):
    name = "granitemoehybrid"
    families = ("granitemoehybrid",)
    gguf_architecture = "granitehybrid"
    gguf_names: ClassVar = mamba_names("mamba")

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        return None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        changed = {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "intermediate_size": shape.expert_width,
            "shared_intermediate_size": shape.shared_width,
        }
        return GraniteMoeHybridConfig(
            **carried(dense, GraniteMoeHybridConfig) | changed, architectures=["GraniteMoeHybridForCausalLM"]
        )

    def gguf(self, config: PreTrainedConfig) -> str:
        return super().gguf(config) if has_mamba(config) else "granitemoe"

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        if not has_mamba(config) and config.position_embedding_type != "rope":
            return "llama.cpp's granitemoe rotates queries and keys by their positions, and this model does not"
        return super().reason_against_gguf(config)

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        if not has_mamba(config):
            return None
        if config.mamba_proj_bias or not config.mamba_conv_bias:
            return "the convolutions of Mamba have biases, and its projections have none"
        if config.time_step_limit is not None and tuple(config.time_step_limit) != _UNBOUNDED:
            return f"Mamba's time steps have no bounds, such as time_step_limit = {list(config.time_step_limit)}"
        return unmixed(config.layer_types)

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        keys = super().gguf_other_keys(config)
        keys["rope.scaling.finetuned"] = config.position_embedding_type == "rope"  # so it is said whether it rotates
        return keys | (_mamba_keys(config) if has_mamba(config) else {})

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        return mamba_content(name, tensor, config.mamba_n_groups)


def has_mamba(config: PreTrainedConfig) -> bool:
    """Whether some layers are Mamba. The smallest models have attention in all, and llama.cpp has them as Granite 3."""
    return any(kind in _MAMBA for kind in config.layer_types)


def _mamba_keys(config: PreTrainedConfig) -> GGUFKeys:
    heads = config.num_key_value_heads
    return {
        # A layer without heads is one of Mamba.
        "attention.head_count_kv": [0 if kind in _MAMBA else heads for kind in config.layer_types],
        "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state,
        "ssm.group_count": config.mamba_n_groups,
        "ssm.time_step_rank": config.mamba_n_heads,
        "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
    }
