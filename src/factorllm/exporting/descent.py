"""Rounded weights made better: what a block's codes stand for and the codes themselves, each chosen again with all the
others known, in turns.

Rounding column by column (`gptq.py`) never comes back to a column, and takes each block's scale from weights that were
still to be moved. Here all scales of a row are those of least squares, and each code is the one of least error
(cyclic coordinate descent, as in QuantEase, arXiv 2309.01885). No step makes a row worse on what the sums are of.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Matrices in blocks of 32 weights with one scale, as four-bit types of GGUF have them.

    Attributes:
        codes: (n, rows, blocks, 32), int64.
        scales: (n, rows, blocks), fp32, each a number of fp16.
        levels: (16,), fp32, ascending: what a code stands for, in units of its block's scale.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    @classmethod
    def of_bytes(cls, made: np.ndarray, levels: Tensor) -> Blocks:
        """Of a file's bytes, (n, rows, bytes of a row), uint8."""
        blocks = made.reshape(*made.shape[:-1], -1, _SCALE_BYTES + BLOCK // 2)
        scales = blocks[..., :_SCALE_BYTES].copy().view(np.float16)[..., 0].astype(np.float32)
        pairs = torch.from_numpy(blocks[..., _SCALE_BYTES:].copy())
        return cls(torch.cat([pairs & 15, pairs >> 4], dim=-1).long(), torch.from_numpy(scales), levels)

    def bytes(self) -> np.ndarray:
        """For a file: byte j of a block has the code of weight j in its low half, and of weight j + 16 in its high."""
        scales = self.scales.numpy().astype(np.float16)[..., None].view(np.uint8)
        low, high = self.codes.to(torch.uint8).unflatten(-1, (2, BLOCK // 2)).unbind(-2)
        blocks = np.concatenate([scales, (low | high << 4).numpy()], axis=-1)
        return blocks.reshape(*blocks.shape[:-2], -1)

    def units(self) -> Tensor:
        """(n, rows, d): the weights, in units of their blocks' scales."""
        return self.levels[self.codes].flatten(-2)

    def weights(self) -> Tensor:
        """(n, rows, d)."""
        return (self.levels[self.codes] * self.scales[..., None]).flatten(-2)


def nearest_code(levels: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """How weights of one column of a block, (n, rows), are rounded: to the codes, int64, of the nearest levels.

    Args:
        scales: of the block in each row, (n, rows).
    """
    between = (levels[1:] + levels[:-1]) / 2
    inverse = torch.where(scales != 0, 1 / scales, 0.0)
    return lambda weights: torch.bucketize(weights * inverse, between)


def columns_of_blocks(width: int) -> list[slice]:
    """The columns of each block of a row."""
    return [slice(first, first + BLOCK) for first in range(0, width, BLOCK)]


def descend(blocks: Blocks, matrices: Tensor, grams: Tensor) -> None:
    """Make the squared error of each row's output less, in place.

    Args:
        matrices: (n, rows, d), fp32, what was rounded.
        grams: (n, d, d), fp32, positive definite: `X^T X` of the inputs X.
    """
    for _ in range(_ROUNDS):
        _choose_scales(blocks, matrices, grams)
        _choose_codes(blocks, matrices, grams)


def squared_errors(lacks: Tensor, grams: Tensor) -> Tensor:
    """(n, rows, d), what weights lack -> (n, rows), the squared error of each row's output, e^T G e."""
    return ((lacks @ grams) * lacks).sum(-1)


def _choose_scales(blocks: Blocks, matrices: Tensor, grams: Tensor) -> None:
    """All scales of a row together by least squares, where that is better when they are rounded to fp16."""
    at_once = max(_AT_ONCE // (len(matrices) * blocks.scales.shape[-1] ** 2), 1)
    for rows in (slice(first, first + at_once) for first in range(0, matrices.shape[1], at_once)):
        units = Blocks(blocks.codes[:, rows], blocks.scales[:, rows], blocks.levels).units()
        products, wanted = _normal_equations(units, matrices[:, rows], grams)
        old = blocks.scales[:, rows].double()
        idle = products.diagonal(dim1=-2, dim2=-1) <= 0  # blocks of zeros, whatever their scale
        new = torch.linalg.solve(products + torch.diag_embed(idle.double()), wanted).half().double()
        better = _error_changes(new, products, wanted) < _error_changes(old, products, wanted)
        blocks.scales[:, rows] = torch.where(better[..., None], new, old).float()


def _normal_equations(units: Tensor, given: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scales with which each row's blocks of `units` come nearest to `given`: (n, rows, blocks, blocks) and
    (n, rows, blocks), fp64."""
    blocks = (units.shape[-1] // BLOCK, BLOCK)
    wanted = (units * (given @ grams)).unflatten(-1, blocks).sum(-1)
    products = wanted.new_zeros(*wanted.shape, blocks[0])
    for block, own in enumerate(columns_of_blocks(units.shape[-1])):
        later = slice(own.start, None)  # the other half is the same
        spread = (units[..., own] @ grams[:, own, later]) * units[..., later]
        products[..., block, block:] = spread.unflatten(-1, (-1, BLOCK)).sum(-1)
    products += products.triu(1).mT
    return products.double(), wanted.double()


def _error_changes(scales: Tensor, products: Tensor, wanted: Tensor) -> Tensor:
    """How scales change the squared error of each row's output from that with scales of 0: (n, rows), fp64."""
    return (((scales[..., None, :] @ products)[..., 0, :] - 2 * wanted) * scales).sum(-1)


def _choose_codes(blocks: Blocks, matrices: Tensor, grams: Tensor) -> None:
    """Each code of a row again, one column after the other."""
    weights = blocks.weights()
    slope = (weights - matrices) @ grams  # half of the gradient of a row's error
    for block, columns in enumerate(columns_of_blocks(matrices.shape[-1])):
        own, scales = grams[:, columns, columns], blocks.scales[..., block]
        nearest = nearest_code(blocks.levels, scales)
        old = weights[..., columns].mT.contiguous()
        new, pull = old.clone(), slope[..., columns].mT.contiguous()
        for column in range(BLOCK):
            codes = nearest(new[:, column] - pull[:, column] / own[:, column, column, None])
            moved = blocks.levels[codes] * scales - new[:, column]
            blocks.codes[..., block, column] = codes
            pull += own[:, column, :, None] * moved[:, None]
            new[:, column] += moved
        slope += (new - old).mT @ grams[:, columns]
