"""CMoE (arXiv 2502.04416): shared neurons by activation rate, routed ones by balanced clustering of their firing."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from factorllm.convert.partition.balanced import (
    balanced_assignment,
    balanced_kmeans,
    label_around_shared,
    shared_and_routed,
)
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape

_FIRING_SHARE = 0.1  # of the neurons, the largest |h| of a token, count as firing for it


def by_activation(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    fires = activated(hidden).float()
    rate = fires.mean(0).cpu()
    _, routed = shared_and_routed(rate, shape.shared_width)
    profile = normalize(fires[:, routed], dim=0)
    gram = (profile.T @ profile).cpu()
    # CMoE starts from the routed neurons that fire most, one a cluster.
    centres = rate[routed].topk(shape.experts).indices
    sizes = [shape.expert_width] * shape.experts
    labels = balanced_kmeans(gram, balanced_assignment(-gram[:, centres], sizes), shape.experts)
    return label_around_shared(routed, labels, shape)


def activated(hidden: Tensor) -> Tensor:
    """Which neurons fire for each token: the largest |h|, CMoE's ATopK. (n, f) -> (n, f), bool."""
    count = max(int(hidden.shape[1] * _FIRING_SHARE), 1)
    largest = hidden.abs().topk(count, dim=1).indices
    return torch.zeros_like(hidden, dtype=torch.bool).scatter_(1, largest, True)
