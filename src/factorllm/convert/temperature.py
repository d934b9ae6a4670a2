"""How sure a student is of its next token. Its last hidden states carry the errors of all layers, and a softmax takes
errors for evidence, so a student is surer than it should be. One factor on its logits repairs that."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from factorllm.dense.ends import Ends
from factorllm.dense.sequences import Sequences
from factorllm.runs.rows import Rows

_LOGITS = 1 << 26  # elements to fit on: 256 MiB in fp32, 1,365 tokens of a vocabulary of 49,152
_AT_ONCE = 1 << 23  # elements: the loss copies them
_BOUNDS = (0.25, 2.0)
_TOLERANCE = 1e-3
_WORTH = 1e-5  # nats a token: less is rounding


def fit_logit_scale(teacher: Tensor, student: Tensor) -> float:
    """The factor on the student's logits that brings its distributions nearest to the teacher's.

    It is the inverse of the temperature of temperature scaling (arXiv 1706.04599), fitted on the teacher's
    distributions instead of labels. `KL(teacher || student)` is convex in it.

    Args:
        teacher: (n, vocabulary) logits, fp32.
        student: (n, vocabulary) logits for the same tokens, fp32.
    """
    tokens = max(_AT_ONCE // student.shape[1], 1)
    runs = student.split(tokens)
    # KL is a constant + the mean of logsumexp(scale * z) - scale * <p, z>, for the student's z and the teacher's p.
    expected = sum(
        (wanted.softmax(dim=1) * logits).sum(dtype=torch.float64).item()
        for wanted, logits in zip(teacher.split(tokens), runs, strict=True)
    )

    def loss(scale: float) -> float:
        normalisers = sum((logits * scale).logsumexp(dim=1).sum(dtype=torch.float64).item() for logits in runs)
        return (normalisers - scale * expected) / len(student)

    best = minimize_scalar(loss, bounds=_BOUNDS, method="bounded", options={"xatol": _TOLERANCE})
    return float(best.x) if best.fun < loss(1.0) - _WORTH else 1.0


def sample_logits(stream: Rows, sequences: Sequences, ends: Ends, vocabulary: int, own: Tensor | None = None) -> Tensor:
    """Logits of tokens that are evenly spread over the text and over the places in a sequence, of no more than fit in
    `_LOGITS` elements: (n, vocabulary), fp32.

    Args:
        stream: hidden states after the last layer, (sequences, length, d).
        sequences: what they are of.
        ends: of the dense model.
        vocabulary: its size.
        own: which sequences are taken, (sequences,), bool; None for all.
    """
    own = torch.ones(stream.sequences, dtype=torch.bool) if own is None else own
    tokens = max(_LOGITS // vocabulary, 1)
    stride = -(-int(own.sum()) * stream.length // tokens)
    # With a factor in common with the length it would meet few places, and too often the first, where nothing is known.
    while math.gcd(stride, stream.length) > 1:
        stride += 1
    parts, first = [], 0
    for run in stream.all_runs():
        states = stream.read(run, torch.device("cpu"))[own[run, None] & ~sequences.is_image(run)]
        parts.append(states[first::stride])
        first = (first - len(states)) % stride
    return ends.logits(torch.cat(parts))
