"""GraniteMoeHybrid: routed experts and one shared expert beside Mamba and attention, for Granite 4 without experts."""

from transformers import GraniteMoeHybridConfig, PreTrainedConfig

from factorllm.hosts.base import carried
from factorllm.hosts.granitemoeshared import GraniteMoeSharedHost
from factorllm.recipe import Shape


class GraniteMoeHybridHost(GraniteMoeSharedHost):
    name = "granitemoehybrid"
    families = ("granitemoehybrid",)
    all_engines = ("transformers", "vllm")
    gguf_architecture = None

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
