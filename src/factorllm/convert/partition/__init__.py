"""Neurons -> experts. One file a method; all give exactly equal experts and lose or repeat no neuron.

A method is a function of the FFN, a sample of its intermediate activations (n, f) and the `Shape`; it returns one
label a neuron, (f,): 0..N-1 for the routed experts, N for the shared one. Experts that overlap have no such labels, and
a function of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from factorllm.convert.partition.activation import by_activation
from factorllm.convert.partition.balanced import shared_and_routed
from factorllm.convert.partition.coactivation import by_coactivation
from factorllm.convert.partition.contiguous import contiguous
from factorllm.convert.partition.energy import by_energy, energy_shares
from factorllm.convert.partition.kmeans import by_weights
from factorllm.convert.partition.overlapping import overlapping
from factorllm.convert.partition.random import at_random
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape

_GENERAL = 0.25  # of all text's energy, beside that of one kind of text

Method = Callable[[FFN, Tensor, Shape, torch.Generator], Tensor]

METHODS: dict[str, Method] = {
    "energy": by_energy,
    "activation": by_activation,
    "coactivation": by_coactivation,
    "kmeans": by_weights,
    "contiguous": contiguous,
    "random": at_random,
}


@dataclass(frozen=True)
class Partition:
    """Which neurons each expert owns.

    Attributes:
        shared: (shared_width,), int64, ascending.
        experts: (N, expert_width), int64, each row ascending.
        ffn_width: neurons of the dense FFN. A static prune owns fewer; experts that overlap may own one several times
            or not at all; every other partition owns all, once.
    """

    shared: Tensor
    experts: Tensor
    ffn_width: int

    @property
    def order(self) -> Tensor:
        """The neurons that are kept, shared ones first, then expert by expert: (kept,), int64."""
        return torch.cat([self.shared, self.experts.flatten()])

    def expert_sums(self, values: Tensor) -> Tensor:
        """What the neurons of each expert have together: (n, f) -> (n, N)."""
        return torch.stack([values[:, neurons].sum(1) for neurons in self.experts.to(values.device)], dim=1)


def partition(
    ffn: FFN, hidden: Tensor, shape: Shape, method: str = "energy", generator: torch.Generator | None = None
) -> Partition:
    """Split the FFN's neurons into a shared set and equal experts by the named method; experts that overlap have one.

    Args:
        hidden: (n, f) intermediate activations of a sample of calibration tokens.

    Raises:
        ValueError: when a method breaks its promise of an exact partition.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if shape.overlaps:
        return Partition(*overlapping(ffn, hidden, shape, generator), shape.ffn_width)
    labels = METHODS[method](ffn, hidden, shape, generator).cpu()
    return partition_from_labels(labels, shape)


def keep_top_energy(ffn: FFN, hidden: Tensor, shape: Shape, own: Tensor | None = None) -> Partition:
    """A static prune: the neurons that have most of the tokens' contribution energy in the mean, and no experts.

    For one kind of text these are the ones of largest `e_i + b e`, e_i the mean share over its own tokens and e over
    all.

    Args:
        own: which tokens are of that kind, (n,), bool; None for a prune for all text.
    """
    shares = energy_shares(ffn, hidden)
    score = shares.mean(0)
    if own is not None and own.any():
        score = shares[own].mean(0) + _GENERAL * score
    kept, _ = shared_and_routed(score, shape.shared_width)
    return Partition(kept, kept.new_empty(0, shape.expert_width), shape.ffn_width)


def partition_from_labels(labels: Tensor, shape: Shape) -> Partition:
    """Build a partition from one label a neuron, (f,), and check that it is exact."""
    counts = torch.bincount(labels, minlength=shape.experts + 1).tolist()
    if counts != [shape.expert_width] * shape.experts + [shape.shared_width]:
        raise ValueError(f"not an exact partition: {counts} neurons in the experts and the shared part of {shape}")
    order = torch.argsort(labels, stable=True)
    routed = shape.experts * shape.expert_width
    return Partition(order[routed:], order[:routed].view(shape.experts, shape.expert_width), shape.ffn_width)


def partition_from_order(order: Tensor, shape: Shape) -> Partition:
    """The partition whose `order` is given, (kept,).

    Raises:
        ValueError: when it is none of this shape.
    """
    if len(order) != shape.kept_width:
        raise ValueError(f"{len(order)} neurons, not {shape.kept_width}")
    shared, experts = order[: shape.shared_width], order[shape.shared_width :].view(shape.experts, shape.expert_width)
    # Neurons that run together must be different ones; if experts do not overlap, all together.
    together = [torch.cat([shared, expert]) for expert in experts] if shape.overlaps else [order]
    for neurons in together:
        if not torch.equal(neurons.unique(), neurons.sort().values):
            raise ValueError("a neuron is there twice")
    if order.min() < 0 or order.max() >= shape.ffn_width:
        raise ValueError("a neuron is not of the dense FFN")
    return Partition(shared, experts, shape.ffn_width)
