"""Priors: for each token, what the dense FFN says about which experts matter."""

from __future__ import annotations

import torch
from torch import Tensor

from factorllm.convert.partition import Partition
from factorllm.convert.partition.energy import expert_picks
from factorllm.dense.ffn import FFN, neuron_energy


def expert_scores(ffn: FFN, hidden: Tensor, partition: Partition, top_k: int, prior: str) -> Tensor:
    """Score of each routed expert for each token, larger is better: (n, f) -> (n, N), fp32.

    Args:
        prior: `energy`, the contribution energy `sum_j h_j^2 ||down[:, j]||^2` that is lost with the expert; or
            `paper`, `-mean((E_i(x) - F(x)/r)^2)` with r = N/k (FactorLLM, arXiv 2408.11855, equations 4-5), where F
            is the sum of the routed experts.
    """
    if prior == "energy":
        return partition.expert_sums(neuron_energy(hidden, ffn.neuron_gain()))
    experts = partition.experts.to(hidden.device)
    outputs = torch.stack([hidden[:, neurons] @ ffn.down[:, neurons].T for neurons in experts], dim=1).float()
    fair_share = outputs.sum(1, keepdim=True) * (top_k / len(experts))
    return -(outputs - fair_share).square().mean(-1)


def prior_distribution(scores: Tensor, top_k: int, prior: str) -> Tensor:
    """The prior as a distribution over experts, the target of the PA loss: (n, N) -> (n, N).

    `energy`: each expert's share of the energy. `paper`: the softmax of the 0/1 label of the top-k experts.
    """
    if prior == "energy":
        return scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return expert_picks(scores, top_k).softmax(dim=1)
