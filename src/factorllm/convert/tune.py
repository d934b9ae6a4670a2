"""Fourth step of a layer, if asked for: gradient fit of its kept neurons to the dense FFN.

The restore only moves `down_proj`; this moves the gates and ups too. Its target is the dense FFN's output on the
student's own inputs, a function of the input alone, so what is learnt holds on new text; a target with the drift of the
stream in it does not generalise (docs/experiments).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from factorllm.convert.ridge import GatedHidden, RidgeStatistics, solve_ridge_at
from factorllm.convert.task import LayerTask
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape
from factorllm.runs.device import fast_products
from factorllm.runs.rows import Rows

BATCH = 512
"""Tokens of a step."""

_RATE = 2e-2  # peak learning rate, in units of the root mean square of each matrix
_WARM_UP = 20
_START = 0.03  # strength of the ridge that tuning starts from
_START_TOKENS = 65_536  # that it is fitted on: all would cost a long run half as much time as the tuning

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""FFN inputs (n, d), gate weights (n, N), dense FFN's output (n, d) and weights of the tokens (n,), fp32."""


def tune_layer(task: LayerTask, kept: FFN, router: Tensor | None) -> FFN:
    """The kept neurons, fitted to the dense FFN's output; first in closed form, then by gradient."""
    inputs, shape, device = task.inputs, task.shape, task.device
    output = task.scratch("output", task.middle.length, task.middle.width)
    start = RidgeStatistics(shape, task.middle.width, device)
    runs = list(inputs.runs())
    stride = max(inputs.sequences * inputs.length // _START_TOKENS, 1)
    for number, run in enumerate(runs):
        with fast_products(device):
            dense, weights = task.dense_output(run)
        output.write(run, dense)
        if number % stride == 0:
            x = task.stored_tokens(inputs, run)
            active = GatedHidden.compute(kept, x, task.gates(x, router), shape)
            start.update(active, dense, weights)
        task.tick(run)
    start.share(task.ranks)
    down = solve_ridge_at(start, kept.down.float(), _START, torch.float32)
    steps = task.workplace.tune * sum(-(-(run.stop - run.start) * inputs.length // BATCH) for run in runs)
    tuned = tune(replace(kept, down=down), shape, _batches(task, runs, output, router), steps)
    output.remove()
    # Each process has tuned on its own share of the tokens, from the same start.
    shared = {name: task.ranks.mean(matrix) for name, matrix in tuned.matrices.items()}
    stored = {name: matrix.to(kept.up.dtype) for name, matrix in shared.items()}
    return replace(kept, **stored | {"down": shared["down"]})


def _batches(task: LayerTask, runs: list[slice], output: Rows, router: Tensor | None) -> Iterator[Batch]:
    """The tokens of all runs, shuffled within the runs and the runs among themselves, in each pass anew."""
    for _ in range(task.workplace.tune):
        for number in torch.randperm(len(runs), generator=task.generator).tolist():
            run = runs[number]
            inputs, target, teacher = (
                task.tokens(rows, run) for rows in (task.inputs, output, task.streams.teacher_after)
            )
            batch = inputs, task.gates(inputs, router), target, task.weights(teacher, run)
            for picked in torch.randperm(len(inputs), generator=task.generator).to(task.device).split(BATCH):
                yield tuple(values[picked] for values in batch)
            task.tick(run)


def tune(ffn: FFN, shape: Shape, batches: Iterable[Batch], steps: int) -> FFN:
    """Fit the matrices of the kept neurons by AdamW; each token trains the neurons that it runs.

    Args:
        ffn: neurons in the order shared part, expert 0, expert 1, ...
        batches: one a step; the loss is the squared error relative to the power of the target.
        steps: number of batches, for the schedule.

    Returns:
        The tuned FFN, in fp32.
    """
    matrices = {name: matrix.float().clone().requires_grad_(True) for name, matrix in ffn.matrices.items()}
    groups = [{"params": [matrix], "lr": _RATE * _root_mean_square(matrix)} for matrix in matrices.values()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(_WARM_UP, steps), steps)
    student, device = replace(ffn, **matrices), ffn.up.device
    for x, gates, target, weights in batches:
        with torch.enable_grad(), fast_products(device):
            # All neurons, and the gates as a mask: few large products of one size, where products of the active ones
            # alone are small and of another size in each step, and take four times as long in bfloat16 on a CPU.
            output = GatedHidden(student.hidden(x), gates, shape).dense() @ student.down.T
            error = ((output - target).square().sum(1) * weights).sum()
            (error / (target.square().sum(1) * weights).sum().clamp_min(torch.finfo(torch.float32).tiny)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return replace(ffn, **{name: matrix.detach() for name, matrix in matrices.items()})


def _root_mean_square(matrix: Tensor) -> float:
    return matrix.detach().square().mean().sqrt().item()
