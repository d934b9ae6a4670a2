"""GraniteMoeShared: routed experts and one shared expert, for Llama, Mistral, Phi-3 and Granite."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig, PreTrainedConfig

from factorllm.hosts.base import GGUFKeys, StudentFFN
from factorllm.hosts.granitemoe import GraniteMoeHost, granite_config
from factorllm.hosts.stored import fused, gguf_shared
from factorllm.recipe import Shape


class GraniteMoeSharedHost(GraniteMoeHost):
    name = "granitemoeshared"
    families = ("llama", "mistral", "phi3", "granite")
    shared = "always"
    gguf_ffn: ClassVar = {
        **GraniteMoeHost.gguf_ffn,
        **gguf_shared(*fused("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")),
    }

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("block_sparse_moe", "shared_mlp")

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        return GraniteMoeSharedConfig(
            **granite_config(dense, shape),
            shared_intermediate_size=shape.shared_width,
            architectures=["GraniteMoeSharedForCausalLM"],
        )

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return super().ffn_tensors(student, config) | shared_mlp(student)

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return super().gguf_keys(config) | {"expert_shared_feed_forward_length": config.shared_intermediate_size}


def shared_mlp(student: StudentFFN) -> dict[str, Tensor]:
    """The shared expert as all Granite hosts name it."""
    shared = student.shared()
    return {
        "shared_mlp.input_linear.weight": torch.cat([shared.gate, shared.up]),
        "shared_mlp.output_linear.weight": shared.down,
    }
