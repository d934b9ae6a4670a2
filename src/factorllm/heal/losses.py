"""The losses of healing: `L = L_KD + a L_PA + b L_balance` (FactorLLM, arXiv 2408.11855; `route.pa_loss` is L_PA)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
