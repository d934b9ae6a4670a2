"""The dense model's own architecture, narrower: the host of a static prune."""

import copy
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import family_of, ffn_width, set_ffn_width
from factorllm.hosts.base import Host, Stored, StudentFFN
from factorllm.recipe import Shape


class DenseHost(Host):
    name = "dense"
    gguf_ffn: ClassVar = {f"ffn_{name}.weight": Stored(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")}

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        return "it has no experts" if shape.experts else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        config = copy.deepcopy(dense)
        set_ffn_width(config, shape.kept_width)
        return config

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return family_of(config).ffn.tensors(student.ffn)

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        family = family_of(config)
        if family.gguf is None or not family.writes_gguf:
            return f"GGUF files of {config.model_type} are not supported yet"
        return super().reason_against_gguf(config)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return (family_of(config).ffn.slot,)

    def gguf(self, config: PreTrainedConfig) -> str:
        return family_of(config).gguf or ""

    def gguf_keys(self, config: PreTrainedConfig) -> dict[str, int | float | bool]:
        return {"feed_forward_length": ffn_width(config)}
