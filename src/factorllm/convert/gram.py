"""The Gram matrix of a student's neurons, of which nothing is stored or computed that must be zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from factorllm.errors import refusing
from factorllm.recipe import Shape


@dataclass(frozen=True)
class Gram:
    """A symmetric positive semi-definite matrix of the kept neurons, (kept, kept).

    Where a token runs one expert, no two experts' neurons meet in it, so that the matrix is a block arrowhead: what of
    it is not zero is the shared part's corner, and of each expert a block and its side under the corner. Where experts
    run together, and in a static prune, all of it is the corner.

    Attributes:
        corner: (s, s), of the shared neurons, or of all.
        sides: of each expert (w, s), its neurons with the shared ones.
        blocks: of each expert (w, w).
    """

    corner: Tensor
    sides: list[Tensor]
    blocks: list[Tensor]

    @classmethod
    def zeros(cls, shape: Shape, device: torch.device) -> Gram:
        corner, experts, width = shape.kept_width, 0, 0
        if shape.top_k == 1:
            corner, experts, width = shape.shared_width, shape.experts, shape.expert_width
        sides = [torch.zeros(width, corner, device=device) for _ in range(experts)]
        blocks = [torch.zeros(width, width, device=device) for _ in range(experts)]
        return cls(torch.zeros(corner, corner, device=device), sides, blocks)

    def parts(self) -> Iterator[Tensor]:
        """The tensors that it is stored in."""
        yield self.corner
        yield from self.sides
        yield from self.blocks

    def map(self, function: Callable[..., Tensor], *others: Gram) -> Gram:
        """A matrix whose parts a function makes of the parts of this one and of others of its shape."""
        return Gram(
            function(self.corner, *(other.corner for other in others)),
            [function(*sides) for sides in zip(self.sides, *(other.sides for other in others), strict=True)],
            [function(*blocks) for blocks in zip(self.blocks, *(other.blocks for other in others), strict=True)],
        )

    def __matmul__(self, matrix: Tensor) -> Tensor:
        """(kept, m) -> (kept, m)."""
        top, *rest = self._rows(matrix)
        product = self.corner @ top
        for side, own in zip(self.sides, rest, strict=True):
            product += side.T @ own
        below = [block @ own + side @ top for side, block, own in zip(self.sides, self.blocks, rest, strict=True)]
        return torch.cat([product, *below])

    def mean_diagonal(self) -> Tensor:
        return torch.cat([square.diagonal() for square in (self.corner, *self.blocks)]).mean()

    def solve_damped(self, damping: Tensor, right: Tensor) -> Tensor:
        """`(G + damping I)^-1 right`, by Cholesky factors of each block, and of what they leave of the corner: its
        Schur complement. In the place of G, which is of no use afterwards, for it may have hundreds of MB.

        Args:
            right: (kept, m).

        Raises:
            FactorLLMError: when G holds NaN or infinity.
        """
        top, *rest = self._rows(right)
        eliminated = []
        for side, block, own in zip(self.sides, self.blocks, rest, strict=True):
            factor = _factorised(block, damping)
            side, own = (torch.linalg.solve_triangular(factor, each, upper=False) for each in (side, own))
            self.corner.addmm_(side.T, side, alpha=-1)
            top = top - side.T @ own
            eliminated.append((factor, side, own))
        top = torch.cholesky_solve(top, _factorised(self.corner, damping))
        below = [
            torch.linalg.solve_triangular(factor.T, own - side @ top, upper=True) for factor, side, own in eliminated
        ]
        return torch.cat([top, *below])

    def _rows(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The rows of the corner, and those of each expert."""
        return matrix.split([len(self.corner), *map(len, self.blocks)])


def _factorised(square: Tensor, damping: Tensor) -> Tensor:
    """The Cholesky factor of a damped part, in its place."""
    square.diagonal().add_(damping)
    with refusing(
        "the dense model's activations on this text", "they are all 0, or too large: use another copy of the model"
    ):
        return torch.linalg.cholesky(square, out=square)
