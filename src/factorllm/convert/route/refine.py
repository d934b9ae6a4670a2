"""Refining a router on what its picks cost. The prior says how much each expert holds; it does not know that restored
experts stand in for each other. So the last word is the error of the restored student, for each set of experts that a
token could run."""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch
from torch import Tensor

from factorllm.convert.route.router import fit_linear, pa_loss

MAX_SETS = 512
"""Sets of k of N experts up to which a router is refined: all are compared for each token."""


def can_refine(experts: int, top_k: int) -> bool:
    return 1 < comb(experts, top_k) <= MAX_SETS


def expert_sets(experts: int, top_k: int) -> Tensor:
    """All sets of k of N experts, as 0/1 rows: (S, N), fp32."""
    members = torch.tensor(list(combinations(range(experts), top_k)))
    return torch.zeros(len(members), experts).scatter_(1, members, 1)


def set_errors(outputs: Tensor, residual: Tensor, sets: Tensor) -> Tensor:
    """Squared error of each token with each set of experts, above its best set: (n, S).

    Args:
        outputs: (n, N, d), each expert's output.
        residual: (n, d), what the routed experts should give together.
        sets: (S, N) 0/1.
    """
    single = (outputs @ residual[:, :, None]).squeeze(2)
    pairs = outputs @ outputs.mT
    both = (sets[:, :, None] * sets[:, None, :]).flatten(1)
    errors = pairs.flatten(1) @ both.T - 2 * single @ sets.T
    return errors - errors.min(1, keepdim=True).values


def refine_router(weights: Tensor, x: Tensor, errors: Tensor, sets: Tensor) -> Tensor:
    """Minimise the expected error when a set is drawn with probability `softmax(sum of its experts' logits)`.

    Args:
        weights: (N, d), the router to start from.
        x: (n, d) FFN inputs.
        errors: (n, S) of `set_errors`.
        sets: (S, N) 0/1.

    Returns:
        Router weights (N, d).
    """
    errors = errors / errors.mean().clamp_min(torch.finfo(errors.dtype).tiny)
    return fit_linear(x, lambda logits: ((logits @ sets.T).softmax(1) * errors).sum(1).mean(), weights)


def scale_to_prior(logits: Tensor, prior: Tensor) -> float:
    """The power of two that brings router logits (n, N) nearest to the prior (n, N), by the PA loss.

    The errors that a router is refined on do not say how sure it should be; healing, which compares it with the prior
    again, would pull first at that.
    """
    scales = [2.0**exponent for exponent in range(-12, 5)]
    return min(scales, key=lambda scale: pa_loss(logits * scale, prior).item())
