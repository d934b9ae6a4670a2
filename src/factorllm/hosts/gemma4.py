"""Gemma 4 with experts: routed experts only, beside a dense branch that is silenced, for Gemma 4."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Gemma4TextConfig, PreTrainedConfig

from factorllm.dense.families import of_layers
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.reasons import scaled_in_windows, unwindowed
from factorllm.hosts.stored import WHOLE_FFN, Stored, fused, gguf_experts, stacked
from factorllm.recipe import Shape

_SILENT = 32
"""Neurons, all zero, of the dense branch: llama.cpp quantises in blocks of 32."""

_PRE, _POST = "pre_feedforward_layernorm", "post_feedforward_layernorm"


class Gemma4Host(MoeHost):
    name = "gemma4_text"
    families = ("gemma4_text",)
    shared = "no"
    activation = "gelu_pytorch_tanh"
    rotates_parts = True
    all_engines = ("transformers", "vllm", "llama.cpp")
    gates = SOFTMAX_OF_SELECTED
    gguf_architecture = "gemma4"
    gguf_has_windows = True
    gguf_names: ClassVar = {
        "post_attention_layernorm": "post_attention_norm",
        _PRE: "ffn_norm",
        f"{_PRE}_2": "pre_ffw_norm_2",
        **{f"{_POST}{which}": f"post_ffw_norm{which}" for which in ("", "_1", "_2")},
        "layer_scalar": "layer_output_scale.weight",
    }
    gguf_ffn: ClassVar = {
        **WHOLE_FFN,
        "ffn_gate_inp.weight": Stored("router.proj.weight"),
        "ffn_gate_inp.scale": Stored("router.scale"),
        **gguf_experts(*fused("experts.gate_up_proj", "experts.down_proj")),
        "ffn_down_exps.scale": Stored("router.per_expert_scale"),
    }

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
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
        }

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        if config.use_bidirectional_attention == "all":
            return "no token sees those after it"
        return unwindowed(config.layer_types) or scaled_in_windows(config)

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        within = of_layers(config, "sliding_attention").head_dim
        layers = (config.per_layer_config[index] for index in range(config.num_hidden_layers))
        return {
            "attention.key_length_swa": within,
            "attention.value_length_swa": within,
            "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
            "rope.dimension_count_swa": within,
            "embedding_length_per_layer_input": 0,
            # Of a file that does not say it, llama.cpp caps at 30.
            "final_logit_softcapping": float(config.final_logit_softcapping or 0),
        }
