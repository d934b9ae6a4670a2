"""Last step of a layer: the student's stream after it."""

from __future__ import annotations

import torch
from torch import Tensor

from factorllm.convert.ridge import GatedHidden
from factorllm.convert.task import LayerTask


def advance(task: LayerTask, router: Tensor | None, down: Tensor) -> float:
    """Write the student's stream after the layer; its squared error relative to the teacher's, mean over the tokens.

    Args:
        router: (N, d), None for a static prune.
        down: (d, kept), fp32.
    """
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    for run in task.middle.runs():
        middle = task.middle.read(run, task.device)
        gates = task.gates(task.tokens(task.inputs, run), router)
        active = GatedHidden(task.tokens(task.active, run), gates, task.shape)
        before, beside = task.streams.before.read(run, task.device), task.streams.sequences.beside(run)
        after = task.layer.after(before, middle, active.project(down), beside)
        task.streams.after.write(run, after)
        teacher = task.streams.teacher_after.read(run, task.device).float()
        total += ((after - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()
        task.tick(run)
    return task.ranks.sum(total).item() / (task.middle.sequences * task.middle.length)
