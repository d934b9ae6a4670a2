"""The dense model's own architecture, narrower: the host of a static prune."""

import copy

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.hosts.base import ALL_ENGINES, Host, StudentFFN
from factorllm.recipe import Shape


class DenseHost(Host):
    name = "dense"

    def engines(self, dense: PreTrainedConfig) -> tuple[str, ...]:
        return ALL_ENGINES

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
