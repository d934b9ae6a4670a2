"""What the steps of one layer's conversion share: the layer, what is to be built, and the activations on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from factorllm.convert.partition import Partition
from factorllm.convert.ridge import token_weights
from factorllm.dense.layer import DenseLayer
from factorllm.dense.sequences import Sequences
from factorllm.hosts import Host
from factorllm.recipe import Recipe, Shape
from factorllm.runs.ranks import Ranks
from factorllm.runs.rows import Rows

TOO_LARGE = (
    "the dense model's activations on this text are too large to fit anything to them; use another copy of the model, "
    "or other --text"
)
"""Why numbers may overflow, as a refusal has it."""

OTHERS = 0.1
"""How much all tokens count beside 1 for those of a student's own kind of text: so each kind is fitted to its own text,
and held to what fits all (docs/experiments.md)."""

_ROUTER_TOKENS = 16_384  # for the d x N parameters of a router


@dataclass(frozen=True)
class Streams:
    """Hidden states on disk, each (sequences, length, d).

    Attributes:
        sequences: what they are of.
        teacher_after: the teacher's stream after the layer.
        before: the student's stream before it.
        after: where the student's stream after it is written.
    """

    sequences: Sequences
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
        bears_rounding: whether layers may be computed in bfloat16.
        tune: passes over the tokens that fit the kept neurons by gradient.
        tick: called with the number of sequences after each batch of each of the `passes`.
    """

    device: torch.device
    ranks: Ranks
    scratch: Path
    memory_limit: int
    bears_rounding: bool
    tune: int
    tick: Callable[[int], None]


@dataclass(frozen=True)
class LayerTask:
    """One layer of one student.

    The arrays are filled by `collect`, but for `active`, which is filled by `restore`:
    `middle`, the student's stream before the FFN; `inputs`, what the FFN and the router read; `sample`, all
    intermediate activations of the sampled tokens, which partition and router are fitted on; and `active`, the
    student's activations of all tokens.

    Attributes:
        strength_before: the ridge strength of the layer before, near which this one's is looked for.
        own: which sequences are of the student's kind of text, (sequences,), bool; None for a student of all text.
    """

    layer: DenseLayer
    streams: Streams
    recipe: Recipe
    shape: Shape
    host: Host
    generator: torch.Generator
    workplace: Workplace
    strength_before: float | None = None
    own: Tensor | None = None

    @cached_property
    def stride(self) -> int:
        return max(self.streams.before.sequences * self.streams.before.length // _ROUTER_TOKENS, 1)

    @cached_property
    def middle(self) -> Rows:
        return self.scratch("middle", self.streams.before.length, self.streams.before.width)

    @cached_property
    def inputs(self) -> Rows:
        return self.scratch("inputs", self.streams.before.length, self.streams.before.width)

    @cached_property
    def sample(self) -> Rows:
        return self.scratch("sample", len(range(0, self.streams.before.length, self.stride)), self.layer.ffn.width)

    @cached_property
    def active(self) -> Rows:
        return self.scratch("active", self.streams.before.length, self.shape.kept_width)

    @property
    def device(self) -> torch.device:
        return self.workplace.device

    @property
    def ranks(self) -> Ranks:
        return self.workplace.ranks

    def scratch(self, name: str, length: int, width: int) -> Rows:
        """An array for this layer's activations: in memory up to `memory_limit` bytes, else in a file."""
        before, workplace = self.streams.before, self.workplace
        size = before.sequences * length * width * before.dtype.itemsize
        path = None if size <= workplace.memory_limit else workplace.scratch / f"{name}.rows"
        return Rows(path, before.sequences, length, width, before.dtype, beside=before)

    def remove_arrays(self) -> None:
        """Remove those that are files."""
        for rows in (self.middle, self.inputs, self.sample, self.active):
            rows.remove()

    def tick(self, run: slice) -> None:
        """Say that the sequences of `run` have gone through one more pass."""
        self.workplace.tick(run.stop - run.start)

    def sampled(self, values: Tensor, run: slice) -> Tensor:
        """Each `stride`-th token of the sequences of `run`: (sequences, length, width) -> (sequences, n, width).

        Each sequence begins at another token and goes round: were it the first in all, then, of much text, no others
        would be sampled.
        """
        if self.stride == 1:
            return values
        first = torch.arange(run.start, run.stop, device=values.device)
        places = torch.arange(0, values.shape[1], self.stride, device=values.device)
        return values.take_along_dim(((first[:, None] + places) % values.shape[1])[:, :, None], dim=1)

    def tokens(self, rows: Rows, run: slice, sampled: bool = False) -> Tensor:
        """The tokens of `run`, or those of them that are sampled: (n, width), fp32."""
        return self.stored_tokens(rows, run, sampled).float()

    def stored_tokens(self, rows: Rows, run: slice, sampled: bool = False) -> Tensor:
        """The same in the dtype that they are stored in."""
        values = rows.read(run, self.device)
        return (self.sampled(values, run) if sampled else values).flatten(0, 1)

    def sampled_own(self) -> Iterator[Tensor]:
        """Which of the sampled tokens are of the student's kind of text, run by run: (n,), bool."""
        for run in self.sample.runs():
            yield self.own[run].repeat_interleave(self.sample.length)

    def weights(self, teacher: Tensor, run: slice) -> Tensor:
        """How much the error of each token of `run` counts: (n,), fp32.

        Args:
            teacher: the teacher's stream after the layer for these tokens, (n, d); equally many of each sequence.
        """
        weights = token_weights(teacher)
        if self.own is None:
            return weights
        counts = torch.where(self.own[run], 1 + OTHERS, OTHERS).to(weights)
        return weights * counts.repeat_interleave(len(weights) // len(counts))

    def gates(self, inputs: Tensor, router: Tensor | None) -> Tensor:
        """Gate weights of what the FFN reads, (n, d) -> (n, N)."""
        return self.host.gate_weights(inputs, router, self.shape.top_k)

    def target(self, run: slice, sampled: bool = False) -> tuple[Tensor, Tensor]:
        """What the student's FFN should give, and how much each of all or the sampled tokens counts: (n, d), (n,).

        It is what brings the student's stream back to the teacher's, which also repairs the errors of the layers
        before; or, if the recipe does not say so or the stream is not linear in that output, the dense FFN's output.
        """
        if self.recipe.restore != "stream" or self.layer.norm_follows:
            return self.dense_output(run, sampled)
        teacher = self.tokens(self.streams.teacher_after, run, sampled)
        missing = teacher - self.tokens(self.middle, run, sampled)
        return missing / self.layer.residual, self.weights(teacher, run)

    def dense_output(self, run: slice, sampled: bool = False) -> tuple[Tensor, Tensor]:
        """What the dense FFN gives, and how much each token counts, as `target`."""
        ffn = self.layer.ffn
        inputs = self.stored_tokens(self.inputs, run, sampled)
        teacher = self.tokens(self.streams.teacher_after, run, sampled)
        return (ffn.hidden(inputs) @ ffn.down.T).float(), self.weights(teacher, run)

    def sampled_batches(self, split: Partition) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """FFN inputs, activations of the neurons in the student's order, target and weight of the sampled tokens."""
        order = split.order.to(self.device)
        for run in self.sample.runs():
            hidden = self.tokens(self.sample, run)[:, order]
            yield self.tokens(self.inputs, run, sampled=True), hidden, *self.target(run, sampled=True)
