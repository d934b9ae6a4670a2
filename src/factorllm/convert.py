"""One layer: partition its neurons, fit the router, restore `down_proj`, and bring the student's stream on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from factorllm.ffn import FFN
from factorllm.hosts import StudentFFN
from factorllm.partition import Partition, keep_top_energy, partition
from factorllm.partition.energy import expert_picks
from factorllm.recipe import Recipe, Shape
from factorllm.restore import GatedHidden, RidgeStatistics, solve_ridge
from factorllm.route import expert_scores, fit_router, gate_weights, prior_distribution
from factorllm.stream import DenseLayer, Rows, scratch_rows

FOLDS = 4
"""Parts of the calibration text for cross-validation in `restore.solve_ridge`."""

PASSES = 3
"""Times that a conversion goes over the calibration tokens: collect, accumulate, advance."""

_PARTITION_TOKENS = 12_288  # enough for a split: more changed nothing (docs/experiments.md)
_ROUTER_TOKENS = 65_536  # for d x N parameters
_CHECKED_SHARE = 8  # one in so many of the router's tokens is kept to measure its agreement with the prior


@dataclass(frozen=True)
class Scratch:
    """Where one layer's activations go: memory up to a limit in bytes, then files in the folder."""

    folder: Path
    memory_limit: int


@dataclass(frozen=True)
class _Activations:
    """What the FFN reads and computes for all calibration tokens.

    Attributes:
        middle: (sequences, length, d) the student's stream before the FFN.
        inputs: (sequences, length, d) what the FFN and the router read.
        hidden: (sequences, length, f) intermediate activations.
    """

    middle: Rows
    inputs: Rows
    hidden: Rows

    def remove(self) -> None:
        for rows in (self.middle, self.inputs, self.hidden):
            rows.remove()


def convert_layer(
    layer: DenseLayer,
    teacher_after: Rows,
    student_before: Rows,
    student_after: Rows,
    recipe: Recipe,
    shape: Shape,
    generator: torch.Generator,
    scratch: Scratch,
    device: torch.device,
    tick: Callable[[int], None],
) -> tuple[StudentFFN, dict]:
    """Factorise one layer on the student's own hidden states, and write the stream after it to `student_after`.

    Args:
        teacher_after: (sequences, length, d) the teacher's stream after this layer.
        student_before: the student's stream before this layer.
        tick: called with the number of sequences after each batch of each of the `PASSES`.

    Returns:
        The student's FFN, and the layer's statistics for the report.
    """
    acts = _collect(layer, student_before, scratch, device, tick)
    split = _split(layer.ffn, acts, recipe, shape, generator, device)
    router, statistics = _route(layer.ffn, acts, split, recipe, shape, generator, device)
    kept = split.order.to(device)
    down = layer.ffn.down[:, kept].float()

    folds, load = _accumulate(layer.ffn, acts, kept, down, router, shape, recipe, teacher_after, device, tick)
    delta, strength = solve_ridge(folds)
    restored = down + delta
    statistics |= {"expert_load": load, "ridge_strength": strength}
    statistics["stream_error"] = _advance(
        acts, kept, restored, router, shape, teacher_after, student_after, device, tick
    )
    acts.remove()

    ffn = FFN(layer.ffn.gate[kept], layer.ffn.up[kept], restored.to(layer.ffn.down.dtype))
    return StudentFFN(ffn, router, shape), statistics


def _collect(
    layer: DenseLayer, student_before: Rows, scratch: Scratch, device: torch.device, tick: Callable[[int], None]
) -> _Activations:
    d, f = student_before.width, layer.ffn.width
    names = {"middle": d, "inputs": d, "hidden": f}
    acts = _Activations(
        **{
            k: scratch_rows(scratch.folder, k, student_before, width, scratch.memory_limit)
            for k, width in names.items()
        }
    )
    for run in student_before.runs():
        middle = layer.attend(student_before.read(run, device))
        inputs = layer.ffn_input(middle)
        acts.middle.write(run, middle)
        acts.inputs.write(run, inputs)
        acts.hidden.write(run, layer.ffn.hidden(inputs))
        tick(run.stop - run.start)
    return acts


def _sample(rows: Rows, tokens: int, device: torch.device) -> Tensor:
    """About `tokens` tokens, evenly spread: (n, width)."""
    stride = max(rows.sequences * rows.length // tokens, 1)
    return torch.cat([rows.read(run, device).flatten(0, 1)[::stride] for run in rows.runs()])


def _split(
    ffn: FFN, acts: _Activations, recipe: Recipe, shape: Shape, generator: torch.Generator, device: torch.device
) -> Partition:
    hidden = _sample(acts.hidden, _PARTITION_TOKENS, device)
    if recipe.is_prune:
        return keep_top_energy(ffn, hidden, shape)
    return partition(ffn, hidden, shape, recipe.partition, generator)


def _route(
    ffn: FFN,
    acts: _Activations,
    split: Partition,
    recipe: Recipe,
    shape: Shape,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor | None, dict]:
    """The router (N, d), and how often its picks agree with the prior's on tokens that it was not fitted on."""
    if recipe.is_prune:
        return None, {}
    inputs = _sample(acts.inputs, _ROUTER_TOKENS, device).float()
    stride = max(acts.hidden.sequences * acts.hidden.length // _ROUTER_TOKENS, 1)
    scores = torch.cat(
        [
            expert_scores(ffn, acts.hidden.read(run, device).flatten(0, 1)[::stride], split, shape.top_k, recipe.prior)
            for run in acts.hidden.runs()
        ]
    )
    fitted = len(inputs) - len(inputs) // _CHECKED_SHARE
    prior = prior_distribution(scores[:fitted], shape.top_k, recipe.prior)
    router = fit_router(recipe.router, inputs[:fitted], prior, ffn, split, shape.top_k, generator)
    picked = expert_picks(inputs[fitted:] @ router.T, shape.top_k)
    wanted = expert_picks(scores[fitted:], shape.top_k)
    return router, {"router_agreement": ((picked * wanted).sum() / wanted.sum()).item()}


def _accumulate(
    ffn: FFN,
    acts: _Activations,
    kept: Tensor,
    down: Tensor,
    router: Tensor | None,
    shape: Shape,
    recipe: Recipe,
    teacher_after: Rows,
    device: torch.device,
    tick: Callable[[int], None],
) -> tuple[list[RidgeStatistics], list[float]]:
    """Ridge statistics of each fold, and the share of tokens that each expert gets."""
    folds = [RidgeStatistics(shape.kept_width, acts.middle.width, device) for _ in range(FOLDS)]
    load = torch.zeros(shape.experts, device=device)
    for fold, run in _folded_runs(acts.middle):
        hidden = acts.hidden.read(run, device).flatten(0, 1).float()
        active = _gated(hidden[:, kept], acts.inputs.read(run, device), router, shape)
        load += (active.gates > 0).sum(0)
        if recipe.restore == "local":
            target = hidden @ ffn.down.float().T
        else:
            target = (teacher_after.read(run, device) - acts.middle.read(run, device)).flatten(0, 1).float()
        if recipe.restore != "none":
            folds[fold].update(active, target - active.project(down))
        tick(run.stop - run.start)
    tokens = acts.middle.sequences * acts.middle.length
    return folds, (load / tokens).tolist()


def _advance(
    acts: _Activations,
    kept: Tensor,
    down: Tensor,
    router: Tensor | None,
    shape: Shape,
    teacher_after: Rows,
    student_after: Rows,
    device: torch.device,
    tick: Callable[[int], None],
) -> float:
    """Write the student's stream after the layer; returns its squared error relative to the teacher's, mean a token."""
    total = 0.0
    for run in acts.middle.runs():
        hidden = acts.hidden.read(run, device).flatten(0, 1)[:, kept].float()
        active = _gated(hidden, acts.inputs.read(run, device), router, shape)
        middle = acts.middle.read(run, device)
        after = middle + active.project(down).view_as(middle).to(middle.dtype)
        student_after.write(run, after)
        teacher = teacher_after.read(run, device).float()
        total += ((after - teacher).square().sum(-1) / teacher.square().sum(-1)).sum().item()
        tick(run.stop - run.start)
    return total / (student_after.sequences * student_after.length)


def _folded_runs(rows: Rows) -> Iterator[tuple[int, slice]]:
    """Runs of sequences with the fold that they belong to; folds are consecutive, so no document is in many."""
    bounds = [rows.sequences * fold // FOLDS for fold in range(FOLDS + 1)]
    for fold in range(FOLDS):
        for run in rows.runs(bounds[fold], bounds[fold + 1]):
            yield fold, run


def _gated(hidden: Tensor, inputs: Tensor, router: Tensor | None, shape: Shape) -> GatedHidden:
    """`hidden` is (n, kept), in the student's order of neurons; `inputs` is (sequences, length, d)."""
    if router is None:
        return GatedHidden(hidden, hidden.new_zeros(len(hidden), 0), shape)
    logits = inputs.flatten(0, 1).float() @ router.T
    return GatedHidden(hidden, gate_weights(logits, shape.top_k), shape)
