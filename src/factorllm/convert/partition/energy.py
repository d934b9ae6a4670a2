"""Ours: the split that captures the most contribution energy when each token runs its best experts.

The objective is what the shared part and the top-k experts of each token hold of the FFN's contribution energy
(`ffn.neuron_energy`), summed over tokens. It is climbed in turns, each turn exact: given the experts, a token's best
top-k is a sort; given the tokens' picks, the best neurons of the shared part and of all experts together are one
balanced assignment, in which a neuron's gain in an expert is its energy over the tokens that pick the expert.
Balanced k-means on the neurons' energy profiles gives the start.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from factorllm.convert.partition.balanced import (
    balanced_assignment,
    balanced_kmeans,
    label_around_shared,
    random_labels,
    shared_and_routed,
)
from factorllm.dense.ffn import FFN, neuron_energy
from factorllm.recipe import Shape

_ROUNDS = 20
_SMALLEST_GAIN = 2e-4  # of the captured share, below which another round is not worth its time


def by_energy(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    energy = energy_shares(ffn, hidden)
    labels = _kmeans_start(energy, shape, generator)
    total, best = energy.sum(0), -1.0
    for _ in range(_ROUNDS):
        picks = expert_picks(energy @ one_hot(labels, shape.experts + 1)[:, :-1].to(energy), shape.top_k)
        gain = torch.cat([energy.T @ picks, total[:, None]], dim=1)
        labels = balanced_assignment(-gain, [shape.expert_width] * shape.experts + [shape.shared_width]).to(gain.device)
        captured = (gain.gather(1, labels[:, None]).sum() / len(energy)).item()
        if captured - best < _SMALLEST_GAIN:
            break
        best = captured
    return labels


def energy_shares(ffn: FFN, hidden: Tensor) -> Tensor:
    """Each neuron's share of a token's contribution energy: (n, f).

    With shares every token counts the same: the residual stream is normalised before it is read again.
    """
    energy = neuron_energy(hidden, ffn.neuron_gain())
    energy /= energy.sum(1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    return energy


def expert_picks(scores: Tensor, top_k: int) -> Tensor:
    """0/1 mask of the `top_k` largest of each row: (n, N) -> (n, N), in the dtype of the scores."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1).indices, 1)


def _kmeans_start(energy: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    _, routed = shared_and_routed(energy.sum(0), shape.shared_width)
    profile = normalize(energy[:, routed].sqrt(), dim=0)
    start = random_labels([shape.expert_width] * shape.experts, generator)
    labels = balanced_kmeans((profile.T @ profile).cpu(), start, shape.experts)
    return label_around_shared(routed, labels, shape).to(energy.device)
