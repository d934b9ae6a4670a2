"""Balanced k-means on weights: MoEfication's parameter clustering (arXiv 2110.01786, section 3.2).

MoEfication has no shared expert; when the recipe has one it is made of the neurons with the largest share of the
tokens' energy.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from factorllm.convert.partition.balanced import balanced_kmeans, label_around_shared, random_labels, shared_and_routed
from factorllm.convert.partition.energy import energy_shares
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape


def by_weights(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    _, routed = shared_and_routed(energy_shares(ffn, hidden).mean(0), shape.shared_width)
    rows = normalize(ffn.triggers[routed].float(), dim=1)
    start = random_labels([shape.expert_width] * shape.experts, generator)
    labels = balanced_kmeans((rows @ rows.T).cpu(), start, shape.experts)
    return label_around_shared(routed, labels, shape)
