"""Rounding that makes errors good: GPTQ (arXiv 2210.17323, algorithm 1), for types whose blocks have one scale.

A weight that is rounded up puts too much into its row's output; the weights of later columns, which are not rounded
yet, are moved so that on a text's inputs the output comes back as near as it can. What came out is then made better in
turns (`descent.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from factorllm.exporting.descent import BLOCK, Blocks, columns_of_blocks, descend, squared_errors
from factorllm.exporting.ggml import quantize, quantize_loosely
from factorllm.runs.stored import kept_rows

LEVELS = {
    Type.Q4_0: tuple(range(-8, 8)),
    Type.IQ4_NL: tuple(gguf.quants.IQ4_NL.kvalues),
}
"""What a code of four bits stands for, in units of its block's scale."""

_DAMPING = 0.5
"""Of each input's own power, as if it had so much noise of its own. It has: all that was rounded before it, and what a
few thousand tokens have in common by chance. The paper's 0.01 of the mean power is more than all that most inputs have
where a few are massive, so of theirs nothing was made good (docs/experiments.md)."""
_LEAST = 1e-6  # of the mean power, for inputs that are never there


def quantize_compensated(name: str, tensor: np.ndarray, kind: Type, grams: Tensor) -> np.ndarray:
    """A tensor in one of the types of `LEVELS`, its errors made good on a text's inputs.

    Rows that come out better when each block is rounded for itself, by importance, begin with that: a weight that is
    moved beyond what its block's scale reaches is cut off, and what is missing is moved on.

    Args:
        name: for messages.
        tensor: (..., d), fp32, d a multiple of 32.
        kind: the type.
        grams: `X^T X` of the inputs X, (n, d, d), one for each of the n matrices of a tensor of three dimensions.

    Returns:
        uint8, (..., bytes of a row).

    Raises:
        FactorLLMError: when a row does not come out as what was put in.
    """
    matrices = np.ascontiguousarray(tensor, np.float32).reshape(-1, *tensor.shape[-2:])
    typical = float(np.sqrt(np.square(matrices, dtype=np.float64).sum(-1).mean()))
    damped = [_damped(gram) for gram in grams]
    importance = np.concatenate([_importance(gram) for gram in damped])
    plain = quantize(name, matrices, kind, importance)
    each = zip(matrices, damped, importance, plain, strict=True)
    made = [_compensated(matrix, kind, gram, weights[None], alone, typical) for matrix, gram, weights, alone in each]
    return np.stack(made).reshape(*tensor.shape[:-1], -1)


def _compensated(
    matrix: np.ndarray, kind: Type, gram: Tensor, weights: np.ndarray, alone: np.ndarray, typical: float
) -> np.ndarray:
    """The bytes of a matrix.

    Args:
        gram: (d, d), fp64, positive definite.
        weights: as `_Rounding` has them.
        alone: the bytes of each block rounded for itself, which a row keeps that does not stay near what was put in.
        typical: as for `kept_rows`.
    """

    def near(blocks: Blocks) -> Tensor:
        return torch.from_numpy(kept_rows(matrix, blocks.weights().numpy(), typical))

    given, inputs = torch.from_numpy(matrix), gram.float()
    found = _Rounding.of(matrix, kind, gram, weights).run()
    plain = Blocks.of_bytes(alone, found.levels)
    errors, plain_errors = (squared_errors(blocks.weights() - given, inputs) for blocks in (found, plain))
    worse = (errors > plain_errors) | ~near(found)
    found.codes[worse], found.scales[worse] = plain.codes[worse], plain.scales[worse]
    descend(found, given, inputs)
    return np.where(near(found)[:, None], found.bytes(), alone)


def _damped(gram: Tensor) -> Tensor:
    """(d, d), fp64, that can be inverted; of no inputs, as if they had nothing in common."""
    gram = gram.to(torch.float64, copy=True) if gram.any() else torch.eye(len(gram), dtype=torch.float64)
    own = gram.diagonal().clone()
    gram.diagonal().add_(_DAMPING * own + _LEAST * own.mean())
    return gram


def _importance(gram: Tensor) -> np.ndarray:
    """(1, d), fp32: what the squared error of each column counts by itself."""
    diagonal = gram.diagonal()
    found: np.ndarray = (diagonal / diagonal.mean()).float().numpy()[None]
    return found


@dataclass(frozen=True)
class _Rounding:
    """One matrix on its way to a file.

    Attributes:
        rest: (rows, d), fp32: the weights, those that are not rounded yet moved by the errors of those that are.
        pull: (d, d), fp32, upper triangular: how an error in a column moves the later ones.
        weights: (1, d), fp32: what the squared error of each column counts for the choice of scales.
    """

    rest: Tensor
    kind: Type
    pull: Tensor
    weights: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray, kind: Type, gram: Tensor, weights: np.ndarray) -> _Rounding:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        pull = torch.linalg.cholesky(inverse, upper=True).float()
        return cls(torch.from_numpy(matrix.copy()), kind, pull, weights)

    def run(self) -> Blocks:
        """The matrix, rounded from the first block of columns to the last."""
        levels = torch.tensor(LEVELS[self.kind], dtype=torch.float32)
        blocks = [self._block(columns, levels) for columns in columns_of_blocks(self.rest.shape[1])]
        codes, scales = (torch.stack(parts, dim=1) for parts in zip(*blocks, strict=True))
        return Blocks(codes, scales, levels)

    def _block(self, columns: slice, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Round a block of every row, and move what comes after it: its codes, (rows, 32), and scales, (rows,)."""
        weights = np.ascontiguousarray(self.weights[:, columns])
        alone = quantize_loosely(np.ascontiguousarray(self.rest[:, columns].numpy()), self.kind, weights)
        scales = Blocks.of_bytes(alone, levels).scales[:, 0]
        codes, errors = self._codes(columns, scales, levels)
        self.rest[:, columns.stop :] -= errors @ self.pull[columns, columns.stop :]
        return codes, scales

    def _codes(self, columns: slice, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of a block, and what is to be made good after it: (rows, 32), int64 and fp32."""
        between = (levels[1:] + levels[:-1]) / 2
        own = self.pull[columns, columns]
        block = self.rest[:, columns].T.contiguous()
        inverse = torch.where(scales != 0, 1 / scales, 0.0)
        codes = torch.empty(block.shape, dtype=torch.int64)
        errors = torch.empty_like(block)
        for column in range(BLOCK):
            codes[column] = torch.bucketize(block[column] * inverse, between)
            errors[column] = (block[column] - levels[codes[column]] * scales) / own[column, column]
            block[column + 1 :] -= own[column, column + 1 :, None] * errors[column]
        return codes.T, errors.T
