"""The losses of healing: `L = L_KD + a L_PA + b L_balance + c L_label + d L_hidden` (FactorLLM, arXiv 2408.11855;
`route.pa_loss` is L_PA)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_TINY = 1e-6
_ROWS = 128  # of logits that are held in fp32 at once


def top_log_probs(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The teacher's most likely tokens: ids (..., count) int64, and their log-probabilities (..., count) fp32."""
    scaled = logits.float() / temperature
    values, ids = scaled.topk(min(count, logits.shape[-1]), dim=-1)
    return ids, values - scaled.logsumexp(-1, keepdim=True)


def kd_loss(logits: Tensor, top_ids: Tensor, top_log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(teacher || student)` of next-token distributions, mean over positions (Hinton et al., arXiv 1503.02531).

    The teacher's most likely tokens are compared one by one, and the mass of all others as if they were one token.

    Args:
        logits: (..., vocabulary), the student's.
        top_ids: (..., K) tokens.
        top_log_probs: (..., K), the teacher's at the same temperature.
    """
    vocabulary, top = logits.shape[-1], top_ids.shape[-1]
    rows = _KD.apply(
        logits.reshape(-1, vocabulary),
        top_ids.reshape(-1, top).long(),
        top_log_probs.reshape(-1, top).float(),
        temperature,
    )
    return rows.mean() * temperature**2


class _KD(torch.autograd.Function):
    """The divergence of each row, and its gradient by formula, a few rows at a time.

    Left to autograd, a dozen copies of the logits are made, which takes half as long as the whole model's two passes.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(n, vocabulary), (n, K), (n, K) -> (n,)."""
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            scaled = logits[rows].to(torch.float32, copy=True).div_(temperature)
            loss, slope = _divergence(scaled, ids[rows], teacher[rows])
            losses.append(loss)
            if gradient is not None:
                gradient[rows] = slope.div_(temperature)
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[:, None].to(gradient.dtype), None, None, None


def _divergence(logits: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of each row and its gradient with respect to the logits, which are overwritten.

    With p and q the probabilities of teacher and student and r those of all tokens but the K, the gradient is
    `q_j - p_j` for the K tokens, and `q_j (1 - p_r / q_r)` for the others.

    Args:
        logits: (n, vocabulary), fp32.
        ids, teacher: (n, K), the K tokens and the teacher's log-probabilities of them.
    """
    logits -= logits.amax(-1, keepdim=True)
    known = logits.gather(-1, ids)
    probabilities = logits.exp_()
    total = probabilities.sum(-1, keepdim=True)
    student = known - total.log()
    teacher_rest, student_rest = _rest(teacher), _rest(student)
    loss = (teacher.exp() * (teacher - student)).sum(-1) + teacher_rest * (teacher_rest / student_rest).log()
    probabilities *= (1 - teacher_rest / student_rest)[:, None] / total
    return loss, probabilities.scatter_(-1, ids, student.exp() - teacher.exp())


def _rest(log_probs: Tensor) -> Tensor:
    return (1 - log_probs.exp().sum(-1)).clamp_min(_TINY)


def label_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the tokens that do follow, mean over positions (Hinton et al., arXiv 1503.02531, section 2): the
    divergence from a teacher who is sure of them.

    Args:
        logits: (sequences, length, vocabulary).
        tokens: (sequences, length).
    """
    following = tokens[:, 1:, None]
    return kd_loss(logits[:, :-1], following, torch.zeros_like(following, dtype=torch.float32))


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
