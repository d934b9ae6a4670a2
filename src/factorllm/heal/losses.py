"""The losses of healing: `L = L_KD + a L_PA + b L_balance + c L_label + d L_hidden` (FactorLLM, arXiv 2408.11855;
`route.pa_loss` is L_PA)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

_TINY = 1e-6


def top_log_probs(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's most likely tokens: ids (..., count) int64, and their log-probabilities (..., count) fp32."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    values, ids = log_probs.topk(min(count, logits.shape[-1]), dim=-1)
    return ids, values


def kd_loss(logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(teacher || student)` of next-token distributions, mean over positions (Hinton et al., arXiv 1503.02531).

    The teacher's most likely tokens are compared one by one, and the mass of all others as if they were one token.

    Args:
        logits: (..., vocabulary), the student's.
        top_ids: (..., K) tokens.
        top_log_probs: (..., K), the teacher's at the same temperature.
    """
    scaled = logits.float() / temperature
    student = scaled.gather(-1, top_ids.long()) - scaled.logsumexp(-1, keepdim=True)
    teacher = top_log_probs.float()
    known = (teacher.exp() * (teacher - student)).sum(-1)
    teacher_rest, student_rest = _rest(teacher), _rest(student)
    rest = teacher_rest * (teacher_rest.log() - student_rest.log())
    return (known + rest).mean() * temperature**2


def _rest(log_probs: Tensor) -> Tensor:
    return (1 - log_probs.exp().sum(-1)).clamp_min(_TINY)


def label_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the tokens that do follow, mean over positions (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits: (sequences, length, vocabulary).
        tokens: (sequences, length).
    """
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def matched_streams(hidden_states: tuple[Tensor, ...], count: int) -> Tensor:
    """The residual stream after `count` layers, evenly spaced; the last is the one that the output head reads.

    Args:
        hidden_states: the embedding and the stream after each layer, each (sequences, length, d), as transformers
            gives them.

    Returns:
        (sequences, length, count, d); of a model with fewer layers, all of them.
    """
    depth = len(hidden_states) - 1
    count = min(count, depth)
    return torch.stack([hidden_states[round(depth * (i + 1) / count)] for i in range(count)], dim=2)


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`|s - t|^2 / |t|^2` of the residual stream, mean over tokens and layers (after FitNets, arXiv 1412.6550).

    It is relative because streams grow with depth and those of a few tokens are a hundred times as long as others.

    Args:
        student, teacher: (..., d), as `matched_streams` gives them.
    """
    teacher = teacher.float()
    return ((student.float() - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1).clamp_min(_TINY)).mean()


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """`N sum_i f_i P_i`, mean over sequences; 1 when the load is even (Switch Transformer, arXiv 2101.03961, eq. 4).

    `f_i` is expert i's share of the picks and `P_i` the mean of its probability, both over one sequence, so that the
    loss of a batch is the mean of its parts, however the parts are spread over processes.

    Args:
        logits: (sequences, length, N) router logits.
    """
    experts = logits.shape[-1]
    probabilities = logits.softmax(-1).mean(1)
    with torch.no_grad():
        picks = one_hot(logits.topk(top_k, dim=-1).indices, experts).sum(2).float().mean(1) / top_k
    return experts * (picks * probabilities).sum(-1).mean()
