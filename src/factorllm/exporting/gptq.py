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

from factorllm.exporting.descent import BLOCK, Blocks, columns_of_blocks, descend, nearest_code, squared_errors
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
_AT_ONCE = 1 << 24  # numbers of the sums of matrices that are rounded together


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
    matrices = torch.from_numpy(np.ascontiguousarray(tensor, np.float32)).reshape(-1, *tensor.shape[-2:])
    typical = float(matrices.double().square().sum(-1).mean().sqrt())
    at_once = max(_AT_ONCE // grams.shape[-1] ** 2, 1)
    parts = zip(matrices.split(at_once), grams.split(at_once), strict=True)
    made = [_compensated(name, own, kind, _damped(inputs), typical) for own, inputs in parts]
    return np.concatenate(made).reshape(*tensor.shape[:-1], -1)


def _compensated(name: str, matrices: Tensor, kind: Type, grams: Tensor, typical: float) -> np.ndarray:
    """The bytes of some matrices. Rows that do not stay near what was put in keep each block rounded for itself.

    Args:
        grams: (n, d, d), fp64, positive definite.
        typical: as for `kept_rows`.
    """

    def near(blocks: Blocks) -> Tensor:
        return torch.from_numpy(kept_rows(matrices.numpy(), blocks.weights().numpy(), typical))

    importance = _importance(grams)
    inputs = (grams / grams.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]).float()  # of whatever size, within fp32
    alone = quantize(name, matrices.numpy(), kind, importance)
    found = _Rounding.of(matrices, kind, grams, importance).run()
    plain = Blocks.of_bytes(alone, found.levels)
    errors, plain_errors = (squared_errors(blocks.weights() - matrices, inputs) for blocks in (found, plain))
    worse = (errors > plain_errors) | ~near(found)
    found.codes[worse], found.scales[worse] = plain.codes[worse], plain.scales[worse]
    descend(found, matrices, inputs)
    return np.where(near(found)[..., None], found.bytes(), alone)


def _damped(grams: Tensor) -> Tensor:
    """(n, d, d), fp64, that can be inverted; of no inputs, as if they had nothing in common."""
    idle = ~grams.flatten(1).any(1)
    grams = grams.to(torch.float64, copy=True)
    grams[idle] = torch.eye(grams.shape[-1], dtype=torch.float64)
    own = grams.diagonal(dim1=1, dim2=2)
    own += _DAMPING * own + _LEAST * own.mean(1, keepdim=True)
    return grams


def _importance(grams: Tensor) -> np.ndarray:
    """(n, d), fp32: what the squared error of each column counts by itself."""
    diagonal = grams.diagonal(dim1=1, dim2=2)
    found: np.ndarray = (diagonal / diagonal.mean(1, keepdim=True)).float().numpy()
    return found


@dataclass(frozen=True)
class _Rounding:
    """Matrices on their way to a file.

    Attributes:
        rest: (n, rows, d), fp32: the weights, those that are not rounded yet moved by the errors of those that are.
        pull: (n, d, d), fp32, upper triangular: how an error in a column moves the later ones.
        importance: (n, d), fp32: what the squared error of each column counts for the choice of scales.
    """

    rest: Tensor
    kind: Type
    pull: Tensor
    importance: np.ndarray

    @classmethod
    def of(cls, matrices: Tensor, kind: Type, grams: Tensor, importance: np.ndarray) -> _Rounding:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(grams))
        pull = torch.linalg.cholesky(inverse, upper=True).float()
        return cls(matrices.clone(), kind, pull, importance)

    def run(self) -> Blocks:
        """The matrices, rounded from the first block of columns to the last."""
        levels = torch.tensor(LEVELS[self.kind], dtype=torch.float32)
        blocks = [self._block(columns, levels) for columns in columns_of_blocks(self.rest.shape[-1])]
        codes, scales = (torch.stack(parts, dim=2) for parts in zip(*blocks, strict=True))
        return Blocks(codes, scales, levels)

    def _block(self, columns: slice, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Round a block of every row, and move what comes after it: its codes, (n, rows, 32), and scales, (n, rows)."""
        block = np.ascontiguousarray(self.rest[..., columns].numpy())
        alone = quantize_loosely(block, self.kind, np.ascontiguousarray(self.importance[:, columns]))
        scales = Blocks.of_bytes(alone, levels).scales[..., 0]
        codes, errors = self._codes(columns, scales, levels)
        self.rest[..., columns.stop :] -= errors @ self.pull[:, columns, columns.stop :]
        return codes, scales

    def _codes(self, columns: slice, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of a block, and what is to be made good after it: (n, rows, 32), int64 and fp32."""
        nearest = nearest_code(levels, scales)
        own = self.pull[:, columns, columns]
        block = self.rest[..., columns].mT.contiguous()
        codes = torch.empty(block.shape, dtype=torch.int64)
        errors = torch.empty_like(block)
        for column in range(BLOCK):
            codes[:, column] = nearest(block[:, column])
            missing = block[:, column] - levels[codes[:, column]] * scales
            errors[:, column] = missing / own[:, column, column, None]
            block[:, column + 1 :] -= own[:, column, column + 1 :, None] * errors[:, None, column]
        return codes.mT, errors.mT
