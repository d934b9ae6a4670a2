"""Closed-form repair of `down_proj`: with routing fixed, the student's FFN is linear in it, so the best one is a ridge
regression. Only `M^T M` and `M^T T` are kept, so any number of tokens streams through in the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorllm.convert.gram import Gram
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape
from factorllm.runs.ranks import Ranks

_HEAVIEST = 100.0  # times the median power of a token, above which its weight falls no more

_PROJECTIONS = 64
_USUAL = 0.03  # the strength that most layers take

LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge strengths to choose from, in units of the mean diagonal of `M^T M`."""

WEAKER = 0.1
"""Factor from the cross-validated strength to the one that is used. The cross-validated one gives the smallest error of
one layer. But its bias, the shrinking toward no change, points the same way in every layer and adds up through the
model, while the noise that it suppresses does not; so the model wants weaker ridges (docs/experiments.md)."""


def token_weights(stream: Tensor) -> Tensor:
    """How much each token's error counts: the inverse of its power, so that relative errors count the same, because the
    stream is normalised before it is read again. (n, d) -> (n,), fp32.

    A few tokens have massive activations (arXiv 2402.17762), of 30,000 times the power of others in SmolLM2. All
    other tokens attend to them, so they must stay accurate: above 100 times the median power the weight falls no more.
    With equal weights they alone would decide the fit.
    """
    power = stream.float().square().mean(-1)
    return 1 / (power / power.median()).clamp(max=_HEAVIEST)


@dataclass(frozen=True)
class GatedHidden:
    """Intermediate activations of a batch, of which each token runs the shared part and its gated experts.

    Stands for the matrix `M` = activations times gate weights, (n, kept), without computing its zero blocks.

    Attributes:
        hidden: (n, kept), neurons in the order shared, expert 0, expert 1, ...; anything where an expert does not run.
        gates: (n, N) gate weights, 0 for experts that do not run.
        shape: widths.
    """

    hidden: Tensor
    gates: Tensor
    shape: Shape

    @classmethod
    def compute(cls, ffn: FFN, inputs: Tensor, gates: Tensor, shape: Shape) -> GatedHidden:
        """Run the active neurons only.

        Args:
            ffn: with the kept neurons in the order shared, expert 0, expert 1, ...
            inputs: (n, d).
            gates: (n, N).
        """
        active = cls(torch.zeros(len(inputs), ffn.width, device=inputs.device), gates, shape)
        for _, columns, tokens in active._parts():
            active.hidden[tokens, columns] = ffn.part(columns).hidden(inputs[tokens]).float()
        return active

    def blocks(self) -> Iterator[tuple[int | None, slice, Tensor | slice, Tensor]]:
        """For the shared part, None, and each expert, its number: its columns, the tokens that run it, and its block
        of M."""
        for expert, columns, tokens in self._parts():
            block = self.hidden[tokens, columns]
            yield expert, columns, tokens, block if expert is None else block * self.gates[tokens, expert, None]

    def _parts(self) -> Iterator[tuple[int | None, slice, Tensor | slice]]:
        """For the shared part, None, and each expert, its number: its columns, and the tokens that run it."""
        if self.shape.shared_width:
            yield None, self.shape.shared_columns, slice(None)
        for expert, columns in enumerate(self.shape.expert_columns()):
            yield expert, columns, self.gates[:, expert].nonzero().flatten()

    def dense(self) -> Tensor:
        """M itself: (n, kept)."""
        shared, routed = self.hidden.tensor_split([self.shape.shared_width], dim=1)
        gates = self.gates.to(routed.dtype)[:, :, None]
        routed = routed.view(*self.gates.shape, self.shape.expert_width) * gates
        return torch.cat([shared, routed.flatten(1)], dim=1)

    def project(self, down: Tensor) -> Tensor:
        """`M @ down.T`, the student's FFN output: (n, d)."""
        output = self.hidden.new_zeros(len(self.hidden), len(down))
        for _, columns, tokens, block in self.blocks():
            output[tokens] += block @ down[:, columns].T
        return output


class RidgeStatistics:
    """`G = M^T W M` (kept, kept) and `C = M^T W T` (kept, d) of all tokens seen, W their weights; fp32.

    Args:
        shape: widths of the FFN.
        d: width of the hidden states.
    """

    def __init__(self, shape: Shape, d: int, device: torch.device):
        self._sums = Gram.zeros(shape, device)  # right of the corner's diagonal nothing is read
        self.cross = torch.zeros(shape.kept_width, d, device=device)

    @classmethod
    def of(cls, parts: list[RidgeStatistics]) -> RidgeStatistics:
        """The statistics of all parts' tokens. The list is emptied, for each part has a matrix of all neurons."""
        whole = parts.pop()
        while parts:
            part = parts.pop()
            for own, other in zip(whole._sums.parts(), part._sums.parts(), strict=True):
                own += other
            whole.cross += part.cross
        return whole

    @property
    def gram(self) -> Gram:
        # Kept in the place of the half that was summed up: of 4,864 neurons a second one has 95 MB.
        lower = self._sums.corner
        self._sums = replace(self._sums, corner=lower.tril() + lower.tril(-1).T)
        return self._sums

    def update(self, active: GatedHidden, target: Tensor, weights: Tensor) -> None:
        """Add a batch.

        Args:
            target: (n, d), what the student's FFN should give.
            weights: (n,), how much each token's squared error counts.
        """
        sums, alone = self._sums, active.shape.top_k == 1
        shared = active.shape.shared_columns
        whole = active.hidden if alone else active.dense()
        for expert, columns, tokens, block in active.blocks():
            weighted = (block * weights[tokens, None]).T
            self.cross[columns].addmm_(weighted, target[tokens])
            if alone and expert is not None:
                sums.sides[expert].addmm_(weighted, whole[tokens, shared])
                sums.blocks[expert].addmm_(weighted, block)
            else:
                left = slice(0, columns.stop)
                sums.corner[columns, left].addmm_(weighted, whole[tokens, left])

    def share(self, ranks: Ranks) -> None:
        """Add what the other processes have seen."""
        for part in (*self._sums.parts(), self.cross):
            ranks.sum(part)


def solve_ridge(
    folds: list[RidgeStatistics], down: Tensor, expected: float | None = None
) -> tuple[Tensor, float | None]:
    """The `down_proj` that brings the student's FFN nearest to its target, without leaving the old one needlessly.

    `down + (T - M down^T)^T M (M^T M + lambda I)^-1`. The strength lambda has the smallest squared
    error in cross-validation: each fold is predicted by the solution of the others. No change is a candidate too.

    Args:
        folds: statistics of disjoint parts of the calibration tokens; the list is emptied where a change is
            made, so that they are gone before the largest matrices.
        down: (d, kept), fp32.
        expected: the strength that the layer before took, near which this one's is looked for.

    Returns:
        The new `down_proj` (d, kept), fp32, and the strength used, in units of the mean diagonal of `M^T M`; None when
        no change predicts best.
    """
    best, error = _best_strength(folds, down, expected)
    if error >= 0:
        return down, None
    strength = LAMBDAS[best] * WEAKER
    return solve_ridge_at(RidgeStatistics.of(folds), down, strength), strength


def _best_strength(folds: list[RidgeStatistics], down: Tensor, expected: float | None) -> tuple[int, float]:
    """Index of the strength in `LAMBDAS` that predicts best, and by how much it changes the squared error.

    Which one is best can be told in fp32 and on a few random projections of the output, whose squared errors have the
    same mean, so that a strength costs little more than one factorisation for each fold.
    """
    grams = [fold.gram for fold in folds]
    projection = _projection(len(down), down.device)
    missing = down.T @ projection
    residuals = [fold.cross @ projection - own @ missing for fold, own in zip(folds, grams, strict=True)]
    gram, residual = grams[0].map(lambda *parts: sum(parts), *grams[1:]), sum(residuals)

    def error_change(index: int) -> float:
        """Change of the squared error on tokens that were not fitted, by the strength `LAMBDAS[index]`."""
        total = 0.0
        for own, cross in zip(grams, residuals, strict=True):
            delta = _ridge(gram.map(torch.sub, own), residual - cross, LAMBDAS[index])
            total += ((own @ delta - 2 * cross) * delta).sum().item()
        return total

    nearest = min(range(len(LAMBDAS)), key=lambda index: abs(math.log(LAMBDAS[index] * WEAKER / (expected or _USUAL))))
    return _descend(error_change, len(LAMBDAS), nearest)


def _projection(d: int, device: torch.device) -> Tensor:
    """(d, at most `_PROJECTIONS`): random directions, the same for every layer; all channels where they are as few."""
    if d <= _PROJECTIONS:
        return torch.eye(d, device=device)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(d, _PROJECTIONS, generator=generator) / math.sqrt(_PROJECTIONS)).to(device)


def solve_ridge_at(sums: RidgeStatistics, down: Tensor, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """As `solve_ridge`, with a strength that is given: (d, kept), fp32.

    Args:
        dtype: that it is computed in. fp32 takes half the time, and does where the solution is only a start.
    """
    gram = sums.gram.map(lambda part: part.to(dtype, copy=True))
    down = down.to(dtype)
    missing = sums.cross.to(dtype) - gram @ down.T  # M^T W (T - M down^T)
    return (down + _ridge(gram, missing, strength).T).float()


def _descend(value: Callable[[int], float], count: int, start: int) -> tuple[int, float]:
    """Walk to a minimum of a function with one valley on 0..count-1: its index and value."""
    best, best_value = start, value(start)
    for step in (1, -1):
        first = best
        while 0 <= best + step < count and (new := value(best + step)) < best_value:
            best, best_value = best + step, new
        if best != first:
            break
    return best, best_value


def _ridge(gram: Gram, cross: Tensor, strength: float) -> Tensor:
    """`(gram + lambda I)^-1 cross`; `gram` is of no use afterwards."""
    return gram.solve_damped(strength * gram.mean_diagonal().clamp_min(torch.finfo(torch.float32).tiny), cross)
