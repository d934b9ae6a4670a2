"""The files of a front, and which of them quantisation alone does not give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, in_mean

Kind = Literal["dense", "student", "trimmed", "static prune"]
Place = tuple[float, float]


@dataclass(frozen=True)
class Timed:
    """How fast a file is, against the dense model's q8_0 in the same rounds: median, and the quartiles."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]


@dataclass(frozen=True)
class Point:
    """A file of a front.

    Attributes:
        model: the model's name.
        kind: what it is.
        file_type: as it was asked for.
        size: bytes.
        bits: of the whole file, for a parameter; some tensors take a larger type than was asked for.
        timed: how fast it is.
        perplexity: on the held-out part of the text, for a token of the dense model's.
        scores: by task.
    """

    model: str
    kind: Kind
    file_type: str
    size: int
    bits: float
    timed: Timed
    perplexity: float
    scores: dict[str, Score]


@dataclass(frozen=True)
class Front:
    """What was measured.

    Attributes:
        points: a file each, the dense model's first.
        text: what perplexity was measured on, and models were weighed by.
    """

    points: list[Point]
    text: str
    plan: FrontPlan
    settings: EvalSettings


def plain_loss(cost: float, plain: Sequence[Place]) -> float:
    """The least loss that quantisation alone gives at a cost, or inf where it gives nothing so cheap.

    Whoever pays a cost takes a file that costs as much or less, or mixes types of two files tensor by tensor, which
    gives about what lies on the line between them: so this is the lower convex hull of the dense model's files.

    Args:
        cost: what may be paid: time for a token, or bytes.
        plain: cost and loss of the dense model's files.
    """
    cheaper = [loss for paid, loss in plain if paid <= cost]
    mixed = [
        high + (low - high) * (cost - cheap) / (dear - cheap)
        for (cheap, high), (dear, low) in product(plain, plain)
        if cheap < cost < dear
    ]
    return min([*cheaper, *mixed], default=math.inf)


def decode_time(point: Point) -> float:
    """Time for a token, x the dense model's q8_0."""
    return 1 / point.timed.decode[0]


def mebibytes(point: Point) -> float:
    """Size of the file, MiB."""
    return point.size / 2**20


def ahead(point: Point, points: Sequence[Point], cost: Callable[[Point], float]) -> float:
    """How much less a file loses than quantisation alone at the same cost: plain perplexity / its own - 1.

    Args:
        points: all of the front.
        cost: `decode_time` or `mebibytes`.

    Returns:
        inf where quantisation alone gives nothing so cheap.
    """
    plain = [(cost(each), each.perplexity) for each in points if each.kind == "dense"]
    return plain_loss(cost(point), plain) / point.perplexity - 1


def mean_score(point: Point, dense: Point) -> float | None:
    """The mean of the tasks on which the dense model, in the same type, is above chance; None where there are none."""
    counted, _ = in_mean(point.scores, dense.scores)
    return sum(point.scores[task].value for task in counted) / len(counted) if counted else None
