"""Closed-form repair of `down_proj`: with routing fixed, the student's FFN is linear in it, so the best one is a ridge
regression. Only `M^T M` and `M^T T` are kept, so any number of tokens streams through in the same memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorllm.recipe import Shape

LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge strengths to choose from, in units of the mean diagonal of `M^T M`."""


@dataclass(frozen=True)
class GatedHidden:
    """Intermediate activations of a batch, of which each token runs the shared part and its gated experts.

    Stands for the matrix `M` = activations times gate weights, (n, kept), without computing its zero blocks.

    Attributes:
        hidden: (n, kept), neurons in the order shared, expert 0, expert 1, ...
        gates: (n, N) gate weights, 0 for experts that do not run.
        shape: widths.
    """

    hidden: Tensor
    gates: Tensor
    shape: Shape

    def blocks(self):
        """For the shared part and each expert: its columns, the tokens that run it, and its block of M."""
        shared = self.shape.shared_width
        if shared:
            yield slice(0, shared), slice(None), self.hidden[:, :shared]
        for expert in range(self.shape.experts):
            start = shared + expert * self.shape.expert_width
            columns = slice(start, start + self.shape.expert_width)
            tokens = self.gates[:, expert].nonzero().flatten()
            yield columns, tokens, self.hidden[tokens, columns] * self.gates[tokens, expert, None]

    def dense(self) -> Tensor:
        """M itself: (n, kept)."""
        expert_gates = self.gates.repeat_interleave(self.shape.expert_width, dim=1)
        return torch.cat(
            [self.hidden[:, : self.shape.shared_width], self.hidden[:, self.shape.shared_width :] * expert_gates], dim=1
        )

    def project(self, down: Tensor) -> Tensor:
        """`M @ down.T`, the student's FFN output: (n, d)."""
        output = self.hidden.new_zeros(len(self.hidden), len(down))
        for columns, tokens, block in self.blocks():
            output[tokens] += block @ down[:, columns].T
        return output


class RidgeStatistics:
    """`G = M^T M` (kept, kept) and `C = M^T T` (kept, d) of all tokens seen, fp32."""

    def __init__(self, kept: int, d: int, device: torch.device):
        self.gram = torch.zeros(kept, kept, device=device)
        self.cross = torch.zeros(kept, d, device=device)

    def update(self, active: GatedHidden, target: Tensor) -> None:
        """Add a batch; `target` is (n, d), what the student's FFN should give."""
        whole = active.dense()
        for columns, tokens, block in active.blocks():
            self.gram[columns].addmm_(block.T, whole[tokens])
            self.cross[columns].addmm_(block.T, target[tokens])


def solve_ridge(folds: list[RidgeStatistics], down: Tensor) -> tuple[Tensor, float | None]:
    """The `down_proj` that brings the student's FFN nearest to its target, without leaving the old one needlessly.

    `down + (T - M down^T)^T M (M^T M + lambda I)^-1` (DESIGN section 3). The strength lambda has the smallest squared
    error in cross-validation: each fold is predicted by the solution of the others. No change is a candidate too.

    Args:
        folds: statistics of disjoint parts of the calibration tokens.
        down: (d, kept), fp32.

    Returns:
        The new `down_proj` (d, kept), fp32, and lambda in units of the mean diagonal of `M^T M` (None: no change).
    """
    start = down.double().T
    grams = [fold.gram.double() for fold in folds]
    residuals = [fold.cross.double() - gram @ start for fold, gram in zip(folds, grams, strict=True)]
    gram, residual = sum(grams), sum(residuals)
    best_error, best = 0.0, None
    for strength in LAMBDAS:
        error = 0.0
        for fold_gram, fold_residual in zip(grams, residuals, strict=True):
            delta = _ridge(gram - fold_gram, residual - fold_residual, strength)
            error += ((fold_gram @ delta - 2 * fold_residual) * delta).sum().item()
        if error < best_error:
            best_error, best = error, strength
        elif best is not None:
            break  # past its minimum over lambda the error only grows
    if best is None:
        return down, None
    return (start + _ridge(gram, residual, best)).T.float(), best


def _ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    ridge = strength * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
