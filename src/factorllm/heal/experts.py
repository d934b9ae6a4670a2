"""Experts' products in autocast's dtype, which torch's grouped products do not take by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "grouped_mm_autocast"


def use_autocast(model: PreTrainedModel) -> None:
    """Let autocast reach the experts of a model; without it they are computed in the dtype of their weights, fp32."""
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    model.set_experts_implementation(_NAME)


def _forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


class _Cast:
    """A module whose weights read as another dtype; gradients reach the weights themselves."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value
