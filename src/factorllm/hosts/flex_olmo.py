"""FlexOlmo: routed experts only, with norms after attention and FFN, for OLMo 2 and 3."""

from torch import Tensor
from transformers import FlexOlmoConfig, PreTrainedConfig

from factorllm.dense.families import ropes, sliding_window
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import common_config
from factorllm.hosts.gates import SOFTMAX_OF_ALL
from factorllm.hosts.stored import per_expert
from factorllm.recipe import Shape


class FlexOlmoHost(MoeHost):
    name = "flex_olmo"
    families = ("olmo2", "olmo3")
    shared = "no"
    all_engines = ("transformers", "vllm")
    gates = SOFTMAX_OF_ALL
    gguf_architecture = None

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        if getattr(config, "attention_bias", False):
            return "its attention has no biases"
        first, *others = ropes(config)
        return "it rotates all layers alike" if any(rope != first for rope in others) else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        # It has no window: within one there is no difference.
        longest = min(dense.max_position_embeddings, sliding_window(dense) or dense.max_position_embeddings)
        changed = {"rope_parameters": ropes(dense)[0], "max_position_embeddings": longest}
        return FlexOlmoConfig(
            **common_config(dense) | changed,
            intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=False,
            architectures=["FlexOlmoForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return {"mlp.gate.weight": student.router, **per_expert(student.experts(self.gates), "mlp.experts")}

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
