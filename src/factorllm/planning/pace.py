"""How long work on a model will take, from the products that this machine does in a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from factorllm.dense.families import ffn_layers, ffn_width
from factorllm.measure.cost import cost_of, dense_shape
from factorllm.recipe import Recipe
from factorllm.runs.device import has_bfloat16

_WIDTH, _SECONDS = 2048, 1.0
_PASSES = 9
"""Times that each calibration token goes through a layer, or as much work on its activations, in a conversion without
tuning: what Qwen2.5-Coder-0.5B and SmolLM2-135M took on two cores, in products (docs/experiments/2026-11.md)."""
_TRAINED = 16
"""FLOPs for each weight and token in healing: 8 for the student's forward and backward and the teacher's forward, and
as much again for all else, by what both models took on two cores."""

_FULL_PRECISION = 3
"""Times as long as in the dtype that conversions compute in, where that is bfloat16."""


@dataclass(frozen=True)
class Pace:
    """FLOPs in a second of large products, in the dtype that conversions compute in where the machine has it."""

    flops: float

    @classmethod
    def measure(cls) -> Pace:
        """Of this machine's processor, in about a second."""
        dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
        one = torch.randn(_WIDTH, _WIDTH, dtype=dtype)
        one @ one
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < _SECONDS:
            one @ one
            count += 1
        return cls(2 * _WIDTH**3 * count / (time.perf_counter() - start))

    def forward_seconds(self, config: PreTrainedConfig, tokens: int) -> float:
        """Of the dense model's pass over tokens, in fp32.

        Args:
            config: of the dense model.
        """
        return tokens * _FULL_PRECISION * cost_of(config, dense_shape(config)).flops_per_token / self.flops

    def convert_seconds(self, config: PreTrainedConfig, tokens: int) -> float:
        """Of the closed forms of one student.

        Args:
            config: of the dense model.
        """
        ffns, width = len(ffn_layers(config)), ffn_width(config)
        weights = cost_of(config, dense_shape(config)).flops_per_token / 2 - config.vocab_size * config.hidden_size
        return tokens * 2 * (_PASSES * weights + ffns * width**2) / self.flops

    def heal_seconds(self, config: PreTrainedConfig, recipe: Recipe, tokens: int) -> float:
        """Of healing, the teacher's pass among it."""
        active = cost_of(config, recipe.shape(ffn_width(config))).flops_per_token / 2
        return tokens * _TRAINED * active / self.flops
