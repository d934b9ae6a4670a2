"""Rounded weights made better: what a block's codes stand for and the codes themselves, each chosen again with all the
others known, in turns.

Rounding column by column (`gptq.py`) never comes back to a column, and takes each block's scale from weights that were
still to be moved. Here all scales of a row are those of least squares, and each code is the one of least error
(cyclic coordinate descent, as in QuantEase, arXiv 2309.01885). No step makes a row worse on what the sums are of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
"""Weights that share a scale."""

_SCALE_BYTES = 2
_ROUNDS = 3
_AT_ONCE = 1 << 24  # numbers of the systems that are solved at once


@dataclass
class Blocks:
    """A matrix in blocks of 32 weights with one scale, as four-bit types of GGUF have them.

    Attributes:
        codes: (rows, blocks, 32), int64.
        scales: (rows, blocks), fp32, each a number of fp16.
        levels: (16,), fp32, ascending: what a code stands for, in units of its block's scale.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    @classmethod
    def of_bytes(cls, made: np.ndarray, levels: Tensor) -> Blocks:
        """Of a file's bytes, (rows, bytes of a row), uint8."""
        blocks = made.reshape(len(made), -1, _SCALE_BYTES + BLOCK // 2)
        scales = blocks[..., :_SCALE_BYTES].copy().view(np.float16)[..., 0].astype(np.float32)
        pairs = torch.from_numpy(blocks[..., _SCALE_BYTES:].copy())
        return cls(torch.cat([pairs & 15, pairs >> 4], dim=-1).long(), torch.from_numpy(scales), levels)

    def bytes(self) -> np.ndarray:
        """For a file: byte j of a block has the code of weight j in its low half, and of weight j + 16 in its high."""
        scales = self.scales.numpy().astype(np.float16)[..., None].view(np.uint8)
        low, high = self.codes.to(torch.uint8).unflatten(-1, (2, BLOCK // 2)).unbind(-2)
        return np.concatenate([scales, (low | high << 4).numpy()], axis=-1).reshape(len(scales), -1)

    def units(self) -> Tensor:
        """(rows, d): the weights, in units of their blocks' scales."""
        return self.levels[self.codes].flatten(1)

    def weights(self) -> Tensor:
        """(rows, d)."""
        return (self.levels[self.codes] * self.scales[..., None]).flatten(1)


def columns_of_blocks(width: int) -> list[slice]:
    """The columns of each block of a row."""
    return [slice(first, first + BLOCK) for first in range(0, width, BLOCK)]


def descend(blocks: Blocks, matrix: Tensor, gram: Tensor) -> None:
    """Make the squared error of each row's output less, in place.

    Args:
        matrix: (rows, d), fp32, what was rounded.
        gram: (d, d), fp32, positive definite: `X^T X` of the inputs X.
    """
    for _ in range(_ROUNDS):
        _choose_scales(blocks, matrix, gram)
        _choose_codes(blocks, matrix, gram)


def squared_errors(lacks: Tensor, gram: Tensor) -> Tensor:
    """(rows, d), what weights lack -> (rows,), the squared error of each row's output, e^T G e."""
    return ((lacks @ gram) * lacks).sum(1)


def _choose_scales(blocks: Blocks, matrix: Tensor, gram: Tensor) -> None:
    """All scales of a row together by least squares, where that is better when they are rounded to fp16."""
    count = blocks.scales.shape[1]
    at_once = max(_AT_ONCE // count**2, 1)
    for rows in (slice(first, first + at_once) for first in range(0, len(matrix), at_once)):
        own = Blocks(blocks.codes[rows], blocks.scales[rows], blocks.levels)
        given, before = matrix[rows], squared_errors(own.weights() - matrix[rows], gram)
        units = own.units()
        products = torch.empty(len(units), count, count)
        for block, columns in enumerate(columns_of_blocks(units.shape[1])):
            products[:, block] = ((units[:, columns] @ gram[columns]) * units).unflatten(1, (count, BLOCK)).sum(-1)
        wanted = (units * (given @ gram)).unflatten(1, (count, BLOCK)).sum(-1)
        diagonal = products.diagonal(dim1=1, dim2=2)
        diagonal[diagonal <= 0] = 1  # a block of zeros, whatever its scale
        own.scales = torch.linalg.solve(products.double(), wanted.double()).half().float()
        better = squared_errors(own.weights() - given, gram) < before
        blocks.scales[rows] = torch.where(better[:, None], own.scales, blocks.scales[rows])


def _choose_codes(blocks: Blocks, matrix: Tensor, gram: Tensor) -> None:
    """Each code of a row again, one column after the other."""
    between = (blocks.levels[1:] + blocks.levels[:-1]) / 2
    weights = blocks.weights()
    slope = (weights - matrix) @ gram  # half of the gradient of a row's error
    for block, columns in enumerate(columns_of_blocks(matrix.shape[1])):
        own, scales = gram[columns, columns], blocks.scales[:, block]
        inverse = torch.where(scales != 0, 1 / scales, 0.0)
        old = weights[:, columns].T.contiguous()
        new, pull = old.clone(), slope[:, columns].T.contiguous()
        for column in range(BLOCK):
            best = (new[column] - pull[column] / own[column, column]) * inverse
            codes = torch.bucketize(best, between)
            moved = blocks.levels[codes] * scales - new[column]
            blocks.codes[:, block, column] = codes
            pull += own[column, :, None] * moved
            new[column] += moved
        slope += (new - old).T @ gram[columns]
