"""Qwen3-VL-MoE: routed experts only, for Qwen3-VL."""

from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3VLMoeTextConfig

from factorllm.dense.families import biased_projections
from factorllm.hosts.base import GGUFKeys, MoeHost, StudentFFN
from factorllm.hosts.configs import carried
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.hosts.reasons import ALIGNED
from factorllm.hosts.stored import Stored, fused, gguf_experts, stacked
from factorllm.recipe import Shape

_SECTIONS = (24, 20, 20)


class Qwen3VLMoeHost(MoeHost):
    name = "qwen3_vl_moe_text"
    families = ("qwen3_vl_text",)
    shared = "no"
    gates = SOFTMAX_OF_SELECTED
    all_engines = ("transformers", "vllm", "llama.cpp")
    gguf_architecture = "qwen3vlmoe"
    gguf_ffn: ClassVar = {
        "ffn_gate_inp.weight": Stored("mlp.gate.weight"),
        **gguf_experts(*fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True)),
    }

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        return super().reason_against(config, shape) or _square(config.hidden_size, shape)

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        return "not all of its engines read attention biases" if biased_projections(config) else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return Qwen3VLMoeTextConfig(
            **carried(dense, Qwen3VLMoeTextConfig),
            moe_intermediate_size=shape.expert_width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,  # which vLLM asks for, and transformers does always
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        gate_up, down = stacked(student.experts(self.gates))
        return {
            "mlp.gate.weight": student.router,
            "mlp.experts.gate_up_proj": gate_up.transpose(1, 2).contiguous(),
            "mlp.experts.down_proj": down.transpose(1, 2).contiguous(),
        }

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        # Of positions in images; in a text, all are the same.
        return {"rope.dimension_sections": [*config.rope_parameters.get("mrope_section", _SECTIONS), 0]}

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {
            "feed_forward_length": config.intermediate_size,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }


def _square(hidden: int, shape: Shape) -> str | None:
    """Experts' matrices are transposed on disk, and transformers tells that by their shapes: square ones it would leave
    as they are, without a word."""

    def is_square(width: float) -> bool:
        return hidden in (width, 2 * width)

    if not is_square(shape.expert_width):
        return None
    widths = {parts: shape.ffn_width / parts for parts in range(2, 65)}
    fits = [f"1/{parts}" for parts, width in widths.items() if width % ALIGNED == 0 and not is_square(width)]
    return (
        f"experts of {shape.expert_width} neurons have square matrices where the hidden size is {hidden}, and of those "
        "transformers does not see that they are stored transposed, so it would load them wrongly; make each expert "
        f"another share of the FFN: {', '.join(fits) or 'none down to 1/64 fits'}"
    )
