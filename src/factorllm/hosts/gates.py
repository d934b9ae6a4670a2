"""What hosts make of router logits: the weights of the experts' outputs.

Routers are flattened (`route.FLATTEN`), so a host's weights are nearly the same number for each selected expert, and
`scale` times it is nearly 1. With zero logits it is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from factorllm.recipe import Shape


@dataclass(frozen=True)
class Gates:
    """One way to make gate weights.

    Attributes:
        rule: the formula, for people.
        weights: (n, N) logits and k -> (n, N), what the host multiplies each expert's output with, times `scale`; 0 for
            experts that are not selected.
        scale: what `down_proj` is stored times, to make it up.
        scale_rule: the same, for people.
        top_k_is_free: whether the gate weights stay the same when k is changed at serve time.
    """

    rule: str
    weights: Callable[[Tensor, int], Tensor]
    scale: Callable[[Shape], int]
    scale_rule: str
    top_k_is_free: bool


def _of_selected(logits: Tensor, values: Tensor, top_k: int) -> Tensor:
    """`values` (n, k) or (n, N) at the top-k logits, 0 elsewhere."""
    picked = logits.topk(top_k, dim=1).indices
    if values.shape != picked.shape:
        values = values.gather(1, picked)
    return torch.zeros_like(logits).scatter_(1, picked, values)


def _softmax_of_selected(logits: Tensor, top_k: int) -> Tensor:
    return _of_selected(logits, logits.topk(top_k, dim=1).values.softmax(dim=1) * top_k, top_k)


def _softmax_of_all(logits: Tensor, top_k: int) -> Tensor:
    return _of_selected(logits, logits.softmax(dim=1) * logits.shape[1], top_k)


def _sigmoid_of_selected(logits: Tensor, top_k: int) -> Tensor:
    values = logits.topk(top_k, dim=1).values.sigmoid()
    return _of_selected(logits, values / values.sum(1, keepdim=True) * top_k, top_k)


def _sigmoid(logits: Tensor, top_k: int) -> Tensor:
    return _of_selected(logits, 2 * logits.sigmoid(), top_k)


SOFTMAX_OF_SELECTED = Gates("softmax of selected", _softmax_of_selected, lambda shape: shape.top_k, "k", False)
SOFTMAX_OF_ALL = Gates("softmax of all", _softmax_of_all, lambda shape: shape.experts, "N", True)
SIGMOID = Gates("2 x sigmoid", _sigmoid, lambda shape: 1, "1", True)
SIGMOID_OF_SELECTED = Gates("sigmoid of selected", _sigmoid_of_selected, lambda shape: shape.top_k, "k", False)
AVERAGED_SIGMOID = Gates("sigmoid", _sigmoid, lambda shape: 4 if shape.shared_width else 2, "2 or 4", True)
"""Of a host that takes the mean of shared and routed part where there is a shared one."""
