"""Cohere2-MoE: routed and shared experts beside attention on the same input, for Command-R, Command R7B and Aya."""

from dataclasses import replace
from typing import ClassVar

import gguf
from torch import Tensor
from transformers import Cohere2MoeConfig, PreTrainedConfig

from factorllm.dense.families import head_dim
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import AVERAGED_SIGMOID
from factorllm.hosts.reasons import unwindowed
from factorllm.hosts.stored import Stored, gguf_experts, gguf_shared, one_expert, per_expert, projections
from factorllm.recipe import Shape


class Cohere2MoeHost(MoeHost):
    name = "cohere2_moe"
    families = ("cohere2", "cohere")
    shared = "optional"
    shares_whole_experts = True
    all_engines = ("transformers", "vllm", "llama.cpp")
    gates = AVERAGED_SIGMOID
    gguf_architecture = "cohere2moe"
    gguf_has_windows = True
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        **gguf_experts(*projections("mlp.experts.{}")),
        **gguf_shared(*projections("mlp.shared_experts")),
    }

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if getattr(config, "use_qk_norm", False):
            return "it does not normalise queries and keys"
        return "its attention has no biases" if getattr(config, "attention_bias", False) else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        layers = dense.num_hidden_layers
        positions = {"head_dim": head_dim(dense)}
        if dense.model_type == "cohere":  # a layer without a window has no positions there: one as long as any text
            windowed = ["sliding_attention"] * layers
            positions |= {"layer_types": windowed, "sliding_window": dense.max_position_embeddings}
        changed = {
            "intermediate_size": shape.expert_width,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "num_shared_experts": shape.shared_width // shape.expert_width,
            "shared_expert_combination_strategy": "average",
            # With softmax, engines do not agree on what is normalised.
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "mlp_layer_types": ["sparse"] * layers,
            "architectures": ["Cohere2MoeForCausalLM"],
        }
        return Cohere2MoeConfig(**carried(dense, Cohere2MoeConfig) | positions | changed)

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        shared = student.shared()
        doubled = replace(shared, down=shared.down * 2)
        return {
            "mlp.gate.weight": student.router,
            **per_expert(student.experts(self.gates), "mlp.experts"),
            **(one_expert(doubled, "mlp.shared_experts") if shared.width else {}),
        }

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        of_all = config.model_type == "cohere"  # whose student has windows in all layers
        return None if of_all else unwindowed(config.layer_types)

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": config.num_shared_experts,
            "expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
            "expert_weights_norm": False,
            "leading_dense_block_count": 0,
        }

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {"logit_scale": float(config.logit_scale)}
