"""The dense model's own architecture, narrower: the host of a static prune."""

import copy
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import FAMILIES
from factorllm.hosts.base import Host, Stored, StudentFFN
from factorllm.recipe import Shape


class DenseHost(Host):
    name = "dense"
    gguf_ffn: ClassVar = {f"ffn_{name}.weight": Stored(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")}

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        return "it has no experts" if shape.experts else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        config = copy.deepcopy(dense)
        config.intermediate_size = shape.kept_width
        return config

    def ffn_tensors(self, student: StudentFFN) -> dict[str, Tensor]:
        return {
            "mlp.gate_proj.weight": student.ffn.gate,
            "mlp.up_proj.weight": student.ffn.up,
            "mlp.down_proj.weight": student.ffn.down,
        }

    def gguf(self, config: PreTrainedConfig) -> str:
        return FAMILIES[config.model_type].gguf

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {
            "feed_forward_length": config.intermediate_size,
        }
