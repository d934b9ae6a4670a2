"""Gradient fit of one layer's kept neurons to the dense FFN. The restore only moves `down_proj`; this moves the gates
and ups too. Its target is the dense FFN's output on the student's own inputs, a function of the input alone, so what is
learnt holds on new text; a target with the drift of the stream in it does not generalise (docs/experiments.md)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from factorllm.convert.restore import GatedHidden
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape
from factorllm.runs.settings import has_bfloat16

BATCH = 512
"""Tokens of a step."""

_RATE = 2e-2  # peak learning rate, in units of the root mean square of each matrix
_WARM_UP = 20

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""FFN inputs (n, d), gate weights (n, N), dense FFN's output (n, d) and weights of the tokens (n,), fp32."""


def tune(ffn: FFN, shape: Shape, batches: Iterable[Batch], steps: int) -> FFN:
    """Fit gate, up and down of the kept neurons by AdamW; each token trains the neurons that it runs.

    Args:
        ffn: neurons in the order shared part, expert 0, expert 1, ...
        batches: one a step; the loss is the squared error relative to the power of the target.
        steps: number of batches, for the schedule.

    Returns:
        The tuned FFN, in fp32.
    """
    matrices = [matrix.float().clone().requires_grad_(True) for matrix in (ffn.gate, ffn.up, ffn.down)]
    groups = [{"params": [matrix], "lr": _RATE * _root_mean_square(matrix)} for matrix in matrices]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARM_UP, steps), steps)
    device = ffn.gate.device
    for x, gates, target, weights in batches:
        with torch.enable_grad(), tuning_precision(device):
            student = FFN(*matrices)
            # All neurons, and the gates as a mask: few large products of one size, where products of the active ones
            # alone are small and of another size in each step, and take four times as long in bfloat16 on a CPU.
            output = GatedHidden(student.hidden(x), gates, shape).dense() @ student.down.T
            error = ((output - target).square().sum(1) * weights).sum()
            (error / (target.square().sum(1) * weights).sum().clamp_min(torch.finfo(torch.float32).tiny)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return FFN(*(matrix.detach() for matrix in matrices))


def tuning_precision(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 where they are fast: its rounding is far below what a tuned layer's error is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def _root_mean_square(matrix: Tensor) -> float:
    return matrix.detach().square().mean().sqrt().item()
