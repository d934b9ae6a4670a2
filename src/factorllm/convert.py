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
from factorllm.restore import GatedHidden, RidgeStatistics, solve_ridge, token_weights
from factorllm.route import expert_scores, fit_router, gate_weights, prior_distribution
from factorllm.stream import DenseLayer, Rows, scratch_rows

FOLDS = 3
"""Parts of the calibration text for the cross-validation in `restore.solve_ridge`."""

PASSES = 3
"""Times that a conversion goes over the calibration tokens: collect, accumulate, advance."""

_PARTITION_TOKENS = 8192
_ROUTER_TOKENS = 32_768  # for the d x N parameters of a router
_CHECKED_SHARE = 8  # one in so many of the router's tokens is kept to measure its agreement with the prior


@dataclass(frozen=True)
class Streams:
    """Hidden states on disk, each (sequences, length, d).

    Attributes:
        teacher_after: the teacher's stream after the layer.
        before: the student's stream before it.
        after: where the student's stream after it is written.
    """

    teacher_after: Rows
    before: Rows
    after: Rows


@dataclass(frozen=True)
class Workplace:
    """Where and how the work is done.

    Attributes:
        scratch: folder for activations that spill.
        memory_limit: bytes that one kind of activations may take in memory.
        tick: called with the number of sequences after each batch of each of the `PASSES`.
    """

    device: torch.device
    scratch: Path
    memory_limit: int
    tick: Callable[[int], None]


class LayerConversion:
    """The conversion of one layer of one student. `run()` does it all."""

    def __init__(
        self,
        layer: DenseLayer,
        streams: Streams,
        recipe: Recipe,
        shape: Shape,
        generator: torch.Generator,
        workplace: Workplace,
    ):
        self.layer, self.ffn, self.streams = layer, layer.ffn, streams
        self.recipe, self.shape, self.generator = recipe, shape, generator
        self.workplace, self.device = workplace, workplace.device
        d, f = streams.before.width, self.ffn.width
        # The student's stream before the FFN, what the FFN and the router read, and the intermediate activations.
        self.middle, self.inputs, self.hidden = (
            self._scratch(*kind) for kind in (("middle", d), ("inputs", d), ("hidden", f))
        )

    def run(self) -> tuple[StudentFFN, dict]:
        """Factorise the layer on the student's own hidden states and write the stream after it.

        Returns:
            The student's FFN, and the layer's statistics: `router_agreement` (share of the router's picks that the
            prior makes too, on tokens it was not fitted on), `expert_load` (share of tokens that run each expert),
            `ridge_strength`, and `stream_error` (squared error of the stream after the layer relative to the
            teacher's, mean over the calibration tokens).
        """
        self._collect()
        split = self._split()
        router, agreement = (None, None) if self.recipe.is_prune else self._route(split)
        kept = split.order.to(self.device)
        down = self.ffn.down[:, kept].float()
        folds, load = self._accumulate(kept, router)
        restored, strength = (down, None) if self.recipe.restore == "none" else solve_ridge(folds, down)
        error = self._advance(kept, router, restored)
        for rows in (self.middle, self.inputs, self.hidden):
            rows.remove()

        ffn = FFN(self.ffn.gate[kept], self.ffn.up[kept], restored.to(self.ffn.down.dtype))
        statistics = {
            "router_agreement": agreement,
            "expert_load": load,
            "ridge_strength": strength,
            "stream_error": error,
        }
        return StudentFFN(ffn, router, self.shape), statistics

    def _scratch(self, name: str, width: int) -> Rows:
        return scratch_rows(self.workplace.scratch, name, self.streams.before, width, self.workplace.memory_limit)

    def _collect(self) -> None:
        for run in self.middle.runs():
            middle = self.layer.attend(self.streams.before.read(run, self.device))
            inputs = self.layer.ffn_input(middle)
            self.middle.write(run, middle)
            self.inputs.write(run, inputs)
            self.hidden.write(run, self.ffn.hidden(inputs))
            self._tick(run)

    def _split(self) -> Partition:
        hidden = self._sample(self.hidden, _PARTITION_TOKENS)
        if self.recipe.is_prune:
            return keep_top_energy(self.ffn, hidden, self.shape)
        return partition(self.ffn, hidden, self.shape, self.recipe.partition, self.generator)

    def _route(self, split: Partition) -> tuple[Tensor, float]:
        """The router (N, d), and its agreement with the prior."""
        inputs = self._sample(self.inputs, _ROUTER_TOKENS).float()
        scores = self._sample(
            self.hidden,
            _ROUTER_TOKENS,
            lambda hidden: expert_scores(self.ffn, hidden, split, self.shape.top_k, self.recipe.prior),
        )
        fitted = len(inputs) - len(inputs) // _CHECKED_SHARE
        prior = prior_distribution(scores[:fitted], self.shape.top_k, self.recipe.prior)
        router = fit_router(
            self.recipe.router, inputs[:fitted], prior, self.ffn, split, self.shape.top_k, self.generator
        )
        picked = expert_picks(inputs[fitted:] @ router.T, self.shape.top_k)
        wanted = expert_picks(scores[fitted:], self.shape.top_k)
        return router, ((picked * wanted).sum() / wanted.sum()).item()

    def _accumulate(self, kept: Tensor, router: Tensor | None) -> tuple[list[RidgeStatistics], list[float]]:
        """Ridge statistics of each fold, and each expert's share of the tokens."""
        folds = [RidgeStatistics(self.shape.kept_width, self.middle.width, self.device) for _ in range(FOLDS)]
        load = torch.zeros(self.shape.experts, device=self.device)
        for fold, run in self._folded_runs():
            active = self._active(run, kept, router)
            load += (active.gates > 0).sum(0)
            if self.recipe.restore != "none":
                weights = token_weights(self.streams.teacher_after.read(run, self.device).flatten(0, 1))
                folds[fold].update(active, self._target(run), weights)
            self._tick(run)
        return folds, (load / (self.middle.sequences * self.middle.length)).tolist()

    def _target(self, run: slice) -> Tensor:
        """What the student's FFN should give, (tokens, d): the dense FFN's output, or what brings its stream back to
        the teacher's, which also repairs the errors of the layers before."""
        if self.recipe.restore == "local":
            return self.hidden.read(run, self.device).flatten(0, 1).float() @ self.ffn.down.float().T
        teacher, middle = self.streams.teacher_after.read(run, self.device), self.middle.read(run, self.device)
        return (teacher.float() - middle.float()).flatten(0, 1)

    def _advance(self, kept: Tensor, router: Tensor | None, down: Tensor) -> float:
        """Write the student's stream after the layer; returns its relative squared error."""
        total = 0.0
        for run in self.middle.runs():
            middle = self.middle.read(run, self.device)
            output = self._active(run, kept, router).project(down)
            after = middle + output.view_as(middle).to(middle.dtype)
            self.streams.after.write(run, after)
            teacher = self.streams.teacher_after.read(run, self.device).float()
            total += ((after - teacher).square().sum(-1) / teacher.square().sum(-1)).sum().item()
            self._tick(run)
        return total / (self.middle.sequences * self.middle.length)

    def _active(self, run: slice, kept: Tensor, router: Tensor | None) -> GatedHidden:
        """What the tokens of `run` compute in the student."""
        hidden = self.hidden.read(run, self.device).flatten(0, 1)[:, kept].float()
        if router is None:
            return GatedHidden(hidden, hidden.new_zeros(len(hidden), 0), self.shape)
        logits = self.inputs.read(run, self.device).flatten(0, 1).float() @ router.T
        return GatedHidden(hidden, gate_weights(logits, self.shape.top_k), self.shape)

    def _sample(self, rows: Rows, tokens: int, of: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
        """`of` some tokens, about `tokens` of them, evenly spread: (n, width) -> (n, ...)."""
        stride = max(rows.sequences * rows.length // tokens, 1)
        return torch.cat([of(rows.read(run, self.device).flatten(0, 1)[::stride]) for run in rows.runs()])

    def _folded_runs(self) -> Iterator[tuple[int, slice]]:
        """Runs of sequences with the fold that they belong to; folds are consecutive, so few documents are in two."""
        sequences = self.middle.sequences
        for fold in range(FOLDS):
            for run in self.middle.runs(sequences * fold // FOLDS, sequences * (fold + 1) // FOLDS):
                yield fold, run

    def _tick(self, run: slice) -> None:
        self.workplace.tick(run.stop - run.start)
