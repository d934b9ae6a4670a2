"""Graph partitioning of co-activation: MoEfication (arXiv 2110.01786, section 3.2), with METIS.

Neurons that fire on the same tokens become one expert. METIS balances only approximately; an exact balanced assignment
by the same affinities then makes the experts equal. The shared part is the neurons with the largest
share of the tokens' energy.
"""

import numpy as np
import pymetis
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from factorllm.convert.partition.activation import activated
from factorllm.convert.partition.balanced import balanced_assignment, label_around_shared, shared_and_routed
from factorllm.convert.partition.energy import energy_shares
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape

_NEIGHBOURS = 32  # strongest edges kept for each neuron: METIS is made for sparse graphs


def by_coactivation(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    _, routed = shared_and_routed(energy_shares(ffn, hidden).mean(0), shape.shared_width)
    fires = activated(hidden)[:, routed].float()
    together = (fires.T @ fires).fill_diagonal_(0).cpu()
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    rough = torch.tensor(_metis(together, shape.experts, seed))
    affinity = together @ one_hot(rough, shape.experts).float()
    labels = balanced_assignment(-affinity, [shape.expert_width] * shape.experts)
    return label_around_shared(routed, labels, shape)


def _metis(weights: Tensor, clusters: int, seed: int) -> list[int]:
    """Cut the graph of the strongest edges of `weights`, (n, n), into parts: n labels."""
    if clusters == 1:
        return [0] * len(weights)
    neighbours = min(_NEIGHBOURS, len(weights) - 1)
    strong = weights.topk(neighbours, dim=1).indices
    keep = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, strong, True)
    rows, columns = ((keep | keep.T) & (weights > 0)).nonzero(as_tuple=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows.numpy(), minlength=len(weights)))])
    options = pymetis.Options(seed=seed)
    edges = weights[rows, columns].to(torch.int64).numpy()
    graph = pymetis.CSRAdjacency(starts, columns.numpy())
    _, labels = pymetis.part_graph(clusters, adjacency=graph, eweights=edges, options=options, recursive=False)
    return labels
