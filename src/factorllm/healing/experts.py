"""Experts' products in autocast's dtype, which torch's grouped products do not take by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "factorllm_autocast"


def use_autocast(model: PreTrainedModel, device: torch.device) -> None:
    """Let autocast reach the experts of a model; without it they are computed in the dtype of their weights, fp32.

    Args:
        device: where the model is trained, which decides how its experts are computed under autocast.
    """
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    under_autocast = _masked if device.type == "cpu" else _cast

    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        compute = under_autocast if torch.is_autocast_enabled(hidden_states.device.type) else grouped
        return compute(experts, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register(_NAME, forward)
    model.set_experts_implementation(_NAME)


def _cast(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Grouped products of weights that were cast."""
    weights = _Cast(experts, torch.get_autocast_dtype(hidden_states.device.type))
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](weights, hidden_states, top_k_index, top_k_weights)


def _masked(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts for all tokens, and the gate weights as a mask.

    A CPU compiles its bfloat16 products anew for each size, and a group's size is new in each step: that takes longer
    than the products that a mask wastes (docs/experiments.md).
    """
    count, double, _ = experts.gate_up_proj.shape
    tokens = len(hidden_states)
    weights = top_k_weights.new_zeros(tokens, count).scatter(1, top_k_index, top_k_weights)
    gate_up = linear(hidden_states, experts.gate_up_proj.flatten(0, 1)).view(tokens, count, 2, double // 2)
    gate, up = gate_up.unbind(2)
    active = (experts.act_fn(gate) * up * weights[:, :, None]).flatten(1)
    return linear(active, experts.down_proj.transpose(0, 1).flatten(1)).to(hidden_states.dtype)


class _Cast:
    """A module whose weights read as another dtype; gradients reach the weights themselves."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value
