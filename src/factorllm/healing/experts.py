"""Experts' products in autocast's dtype, which torch's grouped products do not take by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from factorllm.dense.modules import expert_hidden

_NAME = "factorllm_autocast"
_ROWS = 64


def use_autocast(model: PreTrainedModel, device: torch.device) -> None:
    """Let autocast reach the experts of a model; without it they are computed in the dtype of their weights, fp32.

    Args:
        device: where the model is trained, which decides how its experts are computed under autocast.
    """
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    under_autocast = _padded if device.type == "cpu" else _cast

    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        compute = under_autocast if torch.is_autocast_enabled(hidden_states.device.type) else grouped
        return compute(experts, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register(_NAME, forward)
    model.set_experts_implementation(_NAME)


def _cast(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Grouped products of weights that were cast."""
    weights = _Cast(experts, torch.get_autocast_dtype(hidden_states.device.type))
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](weights, hidden_states, top_k_index, top_k_weights)


def _padded(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each expert's tokens in turn, filled up to a multiple of `_ROWS` with rows of weight 0.

    A CPU compiles its bfloat16 products anew for each size, and a group's size is new in each step: of so few sizes
    each is compiled once (docs/experiments.md).
    """
    output = torch.zeros_like(hidden_states)
    for expert in range(len(experts.down_proj)):
        rows, slots = (top_k_index == expert).nonzero(as_tuple=True)
        filling = (0, -len(rows) % _ROWS)
        weights = pad(top_k_weights[rows, slots], filling)[:, None]
        rows = pad(rows, filling)
        inner = expert_hidden(experts, expert, hidden_states.index_select(0, rows))
        found = linear(inner * weights, experts.down_proj[expert])
        output = output.index_add(0, rows, found.to(output.dtype))
    return output


class _Cast:
    """A module whose weights read as another dtype; gradients reach the weights themselves."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value
