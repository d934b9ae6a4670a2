"""One layer: partition its neurons, fit the router, restore `down_proj`, and bring the student's stream on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from factorllm.convert.partition import Partition, keep_top_energy, partition
from factorllm.convert.partition.energy import expert_picks
from factorllm.convert.restore import GatedHidden, RidgeStatistics, solve_ridge, solve_ridge_at, token_weights
from factorllm.convert.route import (
    FLATTEN,
    can_refine,
    expert_scores,
    expert_sets,
    fit_router,
    prior_distribution,
    refine_router,
    scale_to_prior,
    set_errors,
)
from factorllm.convert.tune import BATCH, Batch, tune, tuning_precision
from factorllm.dense.ffn import FFN, neuron_energy
from factorllm.dense.layer import DenseLayer
from factorllm.errors import FactorLLMError
from factorllm.hosts import Host, StudentFFN
from factorllm.recipe import Recipe, Shape
from factorllm.runs.ranks import Ranks
from factorllm.runs.rows import Rows

FOLDS = 3
"""Parts of the calibration text for the cross-validation in `restore.solve_ridge`."""

TOO_LARGE = (
    "the dense model's activations on this text are too large to fit anything to them; use another copy of the model, "
    "or other --text"
)
"""Why numbers may overflow, as a refusal has it."""

_PARTITION_TOKENS = 8192
_ROUTER_TOKENS = 16_384  # for the d x N parameters of a router
_REFINING_STRENGTH = 0.1  # of the ridge that restores the student on whose errors a router is refined
_TUNING_START = 0.03  # strength of the ridge that tuning starts from
_TUNING_START_TOKENS = 65_536  # that it is fitted on: all would cost a long run half as much time as the tuning
_CHECKED_SHARE = 8  # one in so many of the router's tokens is kept to measure its agreement with the prior


def passes(tune: int) -> int:
    """Times that a conversion goes over the calibration tokens: collect, accumulate, advance; and to tune, once before
    the passes that tune."""
    return 3 + (1 + tune if tune else 0)


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
        ranks: the processes that share the work.
        scratch: this process's folder for activations that spill.
        memory_limit: bytes that one kind of activations may take in memory.
        tune: passes over the tokens that fit the kept neurons by gradient.
        tick: called with the number of sequences after each batch of each of the `passes`.
    """

    device: torch.device
    ranks: Ranks
    scratch: Path
    memory_limit: int
    tune: int
    tick: Callable[[int], None]


class LayerConversion:
    """The conversion of one layer of one student. `run()` does it all."""

    def __init__(
        self,
        layer: DenseLayer,
        streams: Streams,
        recipe: Recipe,
        shape: Shape,
        host: Host,
        generator: torch.Generator,
        workplace: Workplace,
    ):
        self.layer, self.ffn, self.streams = layer, layer.ffn, streams
        self.recipe, self.shape, self.host, self.generator = recipe, shape, host, generator
        self.workplace, self.device, self.ranks = workplace, workplace.device, workplace.ranks
        before = streams.before
        self.stride = max(before.sequences * before.length // _ROUTER_TOKENS, 1)
        # The student's stream before the FFN; what the FFN and the router read; all intermediate activations of each
        # `stride`-th token, which partition and router are fitted on; and the student's activations of all tokens.
        self.middle = self._scratch("middle", before.length, before.width)
        self.inputs = self._scratch("inputs", before.length, before.width)
        self.sample = self._scratch("sample", len(range(0, before.length, self.stride)), self.ffn.width)
        self.active = self._scratch("active", before.length, shape.kept_width)

    def run(self) -> tuple[StudentFFN, Partition, dict]:
        """Factorise the layer on the student's own hidden states and write the stream after it.

        Returns:
            The student's FFN, which neurons are where in it, and the layer's statistics: `router_agreement` (share of
            the router's picks that the prior makes too, on tokens it was not fitted on), `energy_kept` (share of the
            dense FFN's contribution energy that runs, mean over the sampled tokens), `expert_load` (share of tokens
            that run each expert), `ridge_strength`, and `stream_error` (squared error of the stream after the
            layer relative to the teacher's, mean over the calibration tokens).
        """
        self._collect()
        split = self._split()
        kept = self.ffn.part(split.order.to(self.device))
        router, agreement = (None, None) if self.recipe.is_prune else self._route(split, kept)
        energy_kept = self._energy_kept(split, router)
        if self.workplace.tune:
            kept = self._tune(kept, router)
        folds, load = self._accumulate(kept, router)
        restored, strength = kept.down.float(), None
        if self.recipe.restore != "none":
            restored, strength = solve_ridge(folds, restored)
            restored = self.ranks.same(restored)
        error = self._advance(router, restored)
        for rows in (self.middle, self.inputs, self.sample, self.active):
            rows.remove()

        statistics = {
            "router_agreement": agreement,
            "energy_kept": energy_kept,
            "expert_load": load,
            "ridge_strength": strength,
            "stream_error": error,
        }
        student = FFN(kept.gate, kept.up, restored.to(kept.down.dtype))
        return StudentFFN(student, router, self.shape), split, statistics

    def _scratch(self, name: str, length: int, width: int) -> Rows:
        """An array for this layer's activations: in memory up to `memory_limit` bytes, else in a file."""
        before, workplace = self.streams.before, self.workplace
        size = before.sequences * length * width * before.dtype.itemsize
        path = None if size <= workplace.memory_limit else workplace.scratch / f"{name}.rows"
        return Rows(path, before.sequences, length, width, before.dtype, self.ranks)

    def _collect(self) -> None:
        for run in self.middle.runs():
            middle = self.layer.attend(self.streams.before.read(run, self.device))
            inputs = self.layer.ffn_input(middle)
            self.middle.write(run, middle)
            self.inputs.write(run, inputs)
            self.sample.write(run, self.ffn.hidden(inputs.view_as(middle)[:, :: self.stride]))
            self._tick(run)

    def _split(self) -> Partition:
        stride = max(self.sample.sequences * self.sample.length // _PARTITION_TOKENS, 1)
        hidden = torch.cat([self.sample.read(run, self.device).flatten(0, 1)[::stride] for run in self.sample.runs()])
        hidden = self.ranks.gather(hidden)
        # No partition can compare energies that are infinite.
        most = hidden.abs().max().item() ** 2 * self.ffn.neuron_gain().max().item() * self.ffn.width
        if not most < torch.finfo(torch.float32).max:
            raise FactorLLMError(f"what a neuron adds to the stream overflows float32: {TOO_LARGE}")
        if self.recipe.is_prune:
            split = keep_top_energy(self.ffn, hidden, self.shape)
        else:
            split = partition(self.ffn, hidden, self.shape, self.recipe.partition, self.generator)
        return Partition(self.ranks.same(split.shared), self.ranks.same(split.experts), split.ffn_width)

    def _route(self, split: Partition, kept: FFN) -> tuple[Tensor, float]:
        """The router (N, d), and its agreement with the prior."""
        recipe, shape = self.recipe, self.shape
        inputs, scores = [], []
        for run in self.sample.runs():
            hidden = self.sample.read(run, self.device).flatten(0, 1)
            scores.append(expert_scores(self.ffn, hidden, split, shape.top_k, recipe.prior))
            inputs.append(self._tokens(self.inputs, run, self.stride))
        inputs, scores = self.ranks.gather(torch.cat(inputs)), self.ranks.gather(torch.cat(scores))
        fitted = len(inputs) - len(inputs) // _CHECKED_SHARE
        prior = prior_distribution(scores[:fitted], shape.top_k, recipe.prior)
        router = fit_router(recipe.router, inputs[:fitted], prior, self.ffn, split, shape.top_k, self.generator)
        if recipe.router == "refined" and can_refine(shape.experts, shape.top_k):
            router = self._refine(router, inputs[:fitted], split, kept)
            router *= scale_to_prior(inputs[:fitted] @ router.T, prior)
        router = self.ranks.same(router)
        picked = expert_picks(inputs[fitted:] @ router.T, shape.top_k)
        wanted = expert_picks(scores[fitted:], shape.top_k)
        return router * FLATTEN, ((picked * wanted).sum() / wanted.sum()).item()

    def _refine(self, router: Tensor, inputs: Tensor, split: Partition, kept: FFN) -> Tensor:
        """The router, refined on the errors of the student that is restored with the router's first picks.

        Args:
            inputs: FFN inputs of the first of the sampled tokens, which it is fitted on.
        """
        down = kept.down.float()
        if self.recipe.restore != "none":
            first = RidgeStatistics(self.shape.kept_width, self.middle.width, self.device)
            for x, hidden, target, weights in self._sampled_batches(split):
                active = GatedHidden(hidden, self._gates(x, router * FLATTEN), self.shape)
                first.update(active, target, weights)
            first.share(self.ranks)
            down = solve_ridge_at(first, down, _REFINING_STRENGTH)
        sets = expert_sets(self.shape.experts, self.shape.top_k).to(self.device)
        errors = []
        for _, hidden, target, weights in self._sampled_batches(split):
            shared, *experts = (
                hidden[:, columns] @ down[:, columns].T
                for columns in (self.shape.shared_columns, *self.shape.expert_columns())
            )
            errors.append(set_errors(torch.stack(experts, 1), target - shared, sets) * weights[:, None])
        errors = self.ranks.gather(torch.cat(errors))
        return refine_router(router, inputs, errors[: len(inputs)], sets)

    def _tune(self, kept: FFN, router: Tensor | None) -> FFN:
        """The kept neurons, fitted to the dense FFN's output; first in closed form, then by gradient."""
        output = self._scratch("output", self.middle.length, self.middle.width)
        start = RidgeStatistics(self.shape.kept_width, self.middle.width, self.device)
        runs = list(self.inputs.runs())
        stride = max(self.inputs.sequences * self.inputs.length // _TUNING_START_TOKENS, 1)
        for number, run in enumerate(runs):
            with tuning_precision(self.device):
                dense, weights = self._dense_output(run)
            output.write(run, dense)
            if number % stride == 0:
                inputs = self.inputs.read(run, self.device).flatten(0, 1)
                active = GatedHidden.compute(kept, inputs, self._gates(inputs, router), self.shape)
                start.update(active, dense, weights)
            self._tick(run)
        start.share(self.ranks)
        down = solve_ridge_at(start, kept.down.float(), _TUNING_START)
        steps = self.workplace.tune * sum(-(-(run.stop - run.start) * self.inputs.length // BATCH) for run in runs)
        tuned = tune(FFN(kept.gate, kept.up, down), self.shape, self._tuning_batches(runs, output, router), steps)
        output.remove()
        # Each process has tuned on its own share of the tokens, from the same start.
        gate, up, down = (self.ranks.mean(matrix) for matrix in (tuned.gate, tuned.up, tuned.down))
        return FFN(gate.to(kept.gate.dtype), up.to(kept.up.dtype), down)

    def _tuning_batches(self, runs: list[slice], output: Rows, router: Tensor | None) -> Iterator[Batch]:
        """The tokens of all runs, shuffled within the runs and the runs among themselves, in each pass anew."""
        for _ in range(self.workplace.tune):
            for number in torch.randperm(len(runs), generator=self.generator).tolist():
                run = runs[number]
                inputs, target, teacher = (
                    self._tokens(rows, run) for rows in (self.inputs, output, self.streams.teacher_after)
                )
                batch = inputs, self._gates(inputs, router), target, token_weights(teacher)
                for picked in torch.randperm(len(inputs), generator=self.generator).to(self.device).split(BATCH):
                    yield tuple(values[picked] for values in batch)
                self._tick(run)

    def _energy_kept(self, split: Partition, router: Tensor | None) -> float:
        """Share of the contribution energy that the shared part and the picked experts hold."""
        total, gain = torch.zeros((), dtype=torch.float64, device=self.device), self.ffn.neuron_gain()
        for run in self.sample.runs():
            energy = neuron_energy(self.sample.read(run, self.device).flatten(0, 1), gain)
            runs = energy[:, split.shared].sum(1)
            if router is not None:
                picked = self._gates(self._tokens(self.inputs, run, self.stride), router) > 0
                runs += (split.expert_sums(energy) * picked).sum(1)
            total += (runs / energy.sum(1).clamp_min(torch.finfo(energy.dtype).tiny)).sum()
        return self.ranks.sum(total).item() / (self.sample.sequences * self.sample.length)

    def _sampled_batches(self, split: Partition) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """FFN inputs, activations of the neurons in the student's order, target and weight of the sampled tokens."""
        order = split.order.to(self.device)
        for run in self.sample.runs():
            hidden = self.sample.read(run, self.device).flatten(0, 1)[:, order].float()
            yield self._tokens(self.inputs, run, self.stride), hidden, *self._target(run, self.stride)

    def _tokens(self, rows: Rows, run: slice, stride: int = 1) -> Tensor:
        """Each `stride`-th token of `run`: (n, width), fp32."""
        return rows.read(run, self.device)[:, ::stride].flatten(0, 1).float()

    def _accumulate(self, kept: FFN, router: Tensor | None) -> tuple[list[RidgeStatistics], list[float]]:
        """Run the student's neurons; ridge statistics of each fold, and each expert's share of the tokens."""
        folds = [RidgeStatistics(self.shape.kept_width, self.middle.width, self.device) for _ in range(FOLDS)]
        load = torch.zeros(self.shape.experts, device=self.device)
        for fold, run in self._folded_runs():
            inputs = self.inputs.read(run, self.device).flatten(0, 1)
            active = GatedHidden.compute(kept, inputs, self._gates(inputs, router), self.shape)
            self.active.write(run, active.hidden)
            load += (active.gates > 0).sum(0)
            if self.recipe.restore != "none":
                folds[fold].update(active, *self._target(run))
            self._tick(run)
        for fold in folds:
            fold.share(self.ranks)
        return folds, (self.ranks.sum(load) / (self.middle.sequences * self.middle.length)).tolist()

    def _target(self, run: slice, stride: int = 1) -> tuple[Tensor, Tensor]:
        """What the student's FFN should give, and how much each token counts, for each `stride`-th token: (n, d), (n,).

        It is what brings the student's stream back to the teacher's, which also repairs the errors of the layers
        before; or, if the recipe does not say so, the dense FFN's output.
        """
        if self.recipe.restore != "stream":
            return self._dense_output(run, stride)
        teacher = self._tokens(self.streams.teacher_after, run, stride)
        return teacher - self._tokens(self.middle, run, stride), token_weights(teacher)

    def _dense_output(self, run: slice, stride: int = 1) -> tuple[Tensor, Tensor]:
        """What the dense FFN gives, and how much each token counts, as `_target`."""
        inputs = self.inputs.read(run, self.device)[:, ::stride].flatten(0, 1)
        teacher = self._tokens(self.streams.teacher_after, run, stride)
        return (self.ffn.hidden(inputs) @ self.ffn.down.T).float(), token_weights(teacher)

    def _advance(self, router: Tensor | None, down: Tensor) -> float:
        """Write the student's stream after the layer; returns its relative squared error."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for run in self.middle.runs():
            middle = self.middle.read(run, self.device)
            gates = self._gates(self.inputs.read(run, self.device).flatten(0, 1), router)
            active = GatedHidden(self.active.read(run, self.device).flatten(0, 1).float(), gates, self.shape)
            after = middle + active.project(down).view_as(middle).to(middle.dtype)
            self.streams.after.write(run, after)
            teacher = self.streams.teacher_after.read(run, self.device).float()
            total += ((after - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()
            self._tick(run)
        return self.ranks.sum(total).item() / (self.middle.sequences * self.middle.length)

    def _gates(self, inputs: Tensor, router: Tensor | None) -> Tensor:
        """Gate weights, (tokens, N); a static prune has no experts."""
        if router is None:
            return torch.zeros(len(inputs), 0, device=self.device)
        return self.host.gates.weights(inputs.float() @ router.T, self.shape.top_k)

    def _folded_runs(self) -> Iterator[tuple[int, slice]]:
        """Runs of sequences with the fold that they belong to; folds are consecutive, so few documents are in two."""
        sequences = self.middle.sequences
        for fold in range(FOLDS):
            for run in self.middle.runs(sequences * fold // FOLDS, sequences * (fold + 1) // FOLDS):
                yield fold, run

    def _tick(self, run: slice) -> None:
        self.workplace.tick(run.stop - run.start)
