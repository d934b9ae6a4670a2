"""Ours: experts that may share neurons, for students that run one expert a token.

As in `energy`, the objective is the share of the FFN's contribution energy that runs, climbed in turns, each exact:
given the experts, a token's best one is the largest; given the tokens of an expert, its best neurons are those of most
energy over them. Nothing binds the experts to each other, so no assignment is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorllm.convert.partition.balanced import shared_and_routed
from factorllm.convert.partition.energy import energy_shares, expert_picks
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape

_ROUNDS = 20
_RESTARTS = 4


def overlapping(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The best of some random starts.

    Args:
        hidden: (n, f) intermediate activations of a sample of calibration tokens.

    Returns:
        The shared neurons, (shared_width,), and those of each expert, (N, expert_width), int64, ascending, on the CPU.
    """
    energy = energy_shares(ffn, hidden)
    shared, routed = shared_and_routed(energy.sum(0), shape.shared_width)
    energy = energy[:, routed]
    starts = (_climb(energy, shape, generator) for _ in range(_RESTARTS))
    members, _ = max(starts, key=lambda start: start[1])
    return shared, routed[members.cpu().nonzero()[:, 1]].view(shape.experts, shape.expert_width)


def _climb(energy: Tensor, shape: Shape, generator: torch.Generator) -> tuple[Tensor, float]:
    """Each expert's neurons as a 0/1 mask (N, routed neurons), from random groups of tokens, and what they hold."""
    tokens = len(energy)
    owner = torch.randint(shape.experts, (tokens,), generator=generator).to(energy.device)
    for _ in range(_ROUNDS):
        gain = energy.new_zeros(shape.experts, energy.shape[1]).index_add_(0, owner, energy)
        members = expert_picks(gain, shape.expert_width)
        best, picked = (energy @ members.T).max(1)
        if torch.equal(picked, owner):
            break
        owner = picked
    return members, best.sum().item()
