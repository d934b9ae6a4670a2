"""Hunyuan-MoE: routed experts and one shared expert of their width, for Hunyuan."""

from typing import ClassVar

from torch import Tensor
from transformers import HunYuanMoEV1Config, PreTrainedConfig

from factorllm.dense.families import head_dim, rope_of
from factorllm.dense.gguf.rope import stretched_theta
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.stored import Stored, gguf_experts, gguf_shared, one_expert, per_expert, projections
from factorllm.recipe import Shape


class HunYuanMoeHost(MoeHost):
    name = "hunyuan_v1_moe"
    families = ("hunyuan_v1_dense",)
    shared = "always"
    all_engines = ("transformers", "vllm", "llama.cpp")
    gates = SOFTMAX_OF_SELECTED
    gguf_architecture = "hunyuan-moe"
    gguf_names: ClassVar = {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"}
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.wg.weight"),
        **gguf_experts(*projections("mlp.experts.{}")),
        **gguf_shared(*projections("mlp.shared_mlp")),
    }

    def _reason_against_shape(self, shape: Shape) -> str | None:
        if shape.shared_width not in (0, shape.expert_width):
            return "its shared part must be as wide as an expert"
        return super()._reason_against_shape(shape)

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        layers = dense.num_hidden_layers
        changed = {
            "intermediate_size": shape.expert_width,
            "num_experts": shape.experts,
            # Lists: llama.cpp's converter wants them.
            "moe_topk": [shape.top_k] * layers,
            "moe_intermediate_size": [shape.expert_width] * layers,
            "num_shared_expert": [1] * layers,
            "architectures": ["HunYuanMoEV1ForCausalLM"],
        }
        return HunYuanMoEV1Config(**carried(dense, HunYuanMoEV1Config) | changed)

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {
            "mlp.gate.wg.weight": student.router,
            **per_expert(student.experts(self.gates), "mlp.experts"),
            **one_expert(student.shared(), "mlp.shared_mlp"),
        }

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {"rope.freq_base": stretched_theta(rope_of(config), head_dim(config))}

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.moe_topk[0],
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_feed_forward_length": config.intermediate_size,
        }
