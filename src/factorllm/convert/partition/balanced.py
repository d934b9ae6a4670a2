"""Balanced clustering, shared by the methods: clusters of exactly given sizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from factorllm.recipe import Shape

_MAX_SIMPLEX_STEPS = 10**8
_KMEANS_ROUNDS = 10


def balanced_assignment(cost: Tensor, sizes: list[int]) -> Tensor:
    """The cheapest assignment of n items to m clusters of exactly the given sizes.

    A linear assignment problem whose columns repeat: solved exactly as a transportation problem by network simplex,
    about 300 times faster than on the n x n matrix.

    Args:
        cost: (n, m).
        sizes: m sizes that sum to n.

    Returns:
        (n,), int64, labels 0..m-1 on the CPU.
    """
    import ot  # takes seconds, with half of scikit-learn, and healing, evaluating and serving do without

    costs = np.ascontiguousarray(cost.double().cpu().numpy())
    # The simplex compares costs with an absolute tolerance, so their scale must be one.
    costs /= max(np.abs(costs).max(), np.finfo(np.float64).tiny)
    plan = ot.emd(np.ones(len(costs)), np.asarray(sizes, dtype=np.float64), costs, numItermax=_MAX_SIMPLEX_STEPS)
    return torch.from_numpy(plan.argmax(axis=1))


def balanced_kmeans(gram: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Balanced k-means in the space whose inner products are `gram`, from the given start.

    Args:
        gram: (n, n) inner products of the items.
        labels: (n,) starting labels, equal in number.

    Returns:
        (n,), int64, labels 0..clusters-1, on the CPU.
    """
    size = len(gram) // clusters
    for _ in range(_KMEANS_ROUNDS):
        member = one_hot(labels, clusters).to(gram)
        to_cluster = gram @ member / size
        # ||x - c||^2 without the term ||x||^2, which is the same for every cluster.
        cost = (member * to_cluster).sum(0) / size - 2 * to_cluster
        new = balanced_assignment(cost, [size] * clusters)
        if torch.equal(new, labels):
            break
        labels = new
    return labels


def random_labels(sizes: list[int], generator: torch.Generator) -> Tensor:
    """Labels of clusters of the given sizes, shuffled: (sum(sizes),), int64."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=generator)]


def label_around_shared(routed: Tensor, routed_labels: Tensor, shape: Shape) -> Tensor:
    """Labels of all neurons, (f,), from those of the routed ones; the others are shared."""
    labels = torch.full((shape.ffn_width,), shape.experts)
    labels[routed] = routed_labels
    return labels


def shared_and_routed(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` neurons of highest score, (f,), for the shared part, and all others: int64, ascending, on the CPU."""
    shared = scores.topk(count).indices.sort().values.cpu()
    is_routed = torch.ones(len(scores), dtype=torch.bool)
    is_routed[shared] = False
    return shared, is_routed.nonzero().flatten()
