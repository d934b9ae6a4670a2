"""Fifth step of a layer: run the student's neurons, and refit `down_proj` so that the stream comes back to the
teacher's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from factorllm.convert.ridge import GatedHidden, RidgeStatistics, solve_ridge
from factorllm.convert.task import LayerTask
from factorllm.dense.ffn import FFN
from factorllm.runs.memory import give_back_freed_memory

FOLDS = 3
"""Parts of the calibration text for the cross-validation in `ridge.solve_ridge`."""


def restore(task: LayerTask, kept: FFN, router: Tensor | None) -> tuple[Tensor, float | None, list[float]]:
    """The restored `down_proj` (d, kept), fp32; the ridge strength, None where nothing was refitted; and the share of
    tokens that run each expert. Fills the task's `active`."""
    folds, load = _accumulate(task, kept, router)
    down = kept.down.float()
    if task.recipe.restore == "none":
        return down, None, load
    give_back_freed_memory()  # what malloc kept of the activations would come on top of the largest matrices
    down, strength = solve_ridge(folds, down, task.strength_before)
    return task.ranks.same(down), strength, load


def _accumulate(task: LayerTask, kept: FFN, router: Tensor | None) -> tuple[list[RidgeStatistics], list[float]]:
    """Run the student's neurons; ridge statistics of each fold, and each expert's share of the tokens."""
    shape, middle = task.shape, task.middle
    folds = [RidgeStatistics(shape, middle.width, task.device) for _ in range(FOLDS)]
    load = torch.zeros(shape.experts, device=task.device)
    for fold, run in _folded_runs(task):
        inputs = task.stored_tokens(task.inputs, run)
        active = GatedHidden.compute(kept, inputs, task.gates(inputs, router), shape)
        task.active.write(run, active.hidden)
        load += (active.gates > 0).sum(0)
        if task.recipe.restore != "none":
            folds[fold].update(active, *task.target(run))
        task.tick(run)
    for fold in folds:
        fold.share(task.ranks)
    return folds, (task.ranks.sum(load) / (middle.sequences * middle.length)).tolist()


def _folded_runs(task: LayerTask) -> Iterator[tuple[int, slice]]:
    """Runs of sequences with the fold that they belong to; folds are consecutive, so few documents are in two."""
    sequences = task.middle.sequences
    for fold in range(FOLDS):
        for run in task.middle.runs(sequences * fold // FOLDS, sequences * (fold + 1) // FOLDS):
            yield fold, run
