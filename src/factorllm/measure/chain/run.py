"""Following a chain with one model's answers, and comparing two models that followed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from factorllm.measure.chain.plan import Chain, Question

Ask = Callable[[Question], str]
Thread = tuple[int, tuple[str, ...]]
"""The number of a document, and the answers that led here."""


@dataclass(frozen=True)
class StepScore:
    """How often a student answers as the dense model does, of the questions that the dense model came to.

    Attributes:
        asked: those questions.
        given: share, asked with the dense model's earlier answers.
        own: share, where the student came to the question by its own earlier answers; `given` less this is what the
            errors of earlier steps cost.
    """

    name: str
    asked: int
    given: float
    own: float


@dataclass(frozen=True)
class ChainScore:
    """What models make of a chain.

    Attributes:
        chain: its name.
        documents: their number.
        f1: by model (`student`, `dense`): of what they find in all documents, against what is right.
        found: F1 of what the student finds against what the dense model finds.
        steps: those that the dense model came to; none without a dense model.
    """

    chain: str
    documents: int
    f1: dict[str, float]
    found: float | None = None
    steps: list[StepScore] = field(default_factory=list)


@dataclass(frozen=True)
class Followed:
    """What came of a chain with one model's answers.

    Attributes:
        answers: for each step, question and answer of each thread that came to it.
        found: the number of a document, and what was found there.
    """

    answers: list[dict[Thread, tuple[Question, str]]]
    found: set[Thread]


def follow(chain: Chain, ask: Ask, tick: Callable[[], None] = lambda: None) -> Followed:
    """Answer all of a chain, one document after the other, so that prompts begin as those before them.

    Args:
        tick: called after each document.
    """
    followed = Followed([{} for _ in chain.steps], set())
    for number, document in enumerate(chain.documents):
        _follow(chain, ask, followed, (number, ()), document | {"before": ""})
        tick()
    return followed


def _follow(chain: Chain, ask: Ask, followed: Followed, thread: Thread, known: dict[str, Any]) -> None:
    number, path = thread
    if len(path) == len(chain.steps):
        followed.found.add((number, tuple(known[name] for name in chain.result)))
        return
    step = chain.steps[len(path)]
    question = step.ask(known)
    answer = ask(question)
    followed.answers[len(path)][thread] = (question, answer)
    before = f"{question.prompt} {answer}\n"
    for one in step.follow(answer):
        _follow(chain, ask, followed, (number, (*path, one)), known | {step.name: one, "before": before})


def compare(
    chain: Chain, student: Followed, dense: Followed, ask: Ask, tick: Callable[[], None] = lambda: None
) -> list[StepScore]:
    """How often the student, whose own answers are there, answers the dense model's questions as that does.

    Args:
        ask: the student.
        tick: called after each document that the dense model was asked of.
    """
    given: list[int] = [0] * len(chain.steps)
    own: list[int] = [0] * len(chain.steps)
    threads = sorted(thread for answers in dense.answers for thread in answers)
    for place, thread in enumerate(threads):
        number = len(thread[1])
        step, (question, wanted) = chain.steps[number], dense.answers[number][thread]
        given[number] += step.same(ask(question), wanted)
        reached = student.answers[number].get(thread)
        own[number] += reached is not None and step.same(reached[1], wanted)
        if place + 1 == len(threads) or threads[place + 1][0] != thread[0]:
            tick()
    asked = [len(answers) for answers in dense.answers]
    return [
        StepScore(step.name, count, same / count, its_own / count)
        for step, count, same, its_own in zip(chain.steps, asked, given, own, strict=True)
        if count
    ]


def score(chain: Chain, student: Followed, dense: Followed | None, steps: list[StepScore]) -> ChainScore:
    """What a student, and its dense model if there is one, made of a chain."""
    gold = {(number, tuple(found)) for number, each in enumerate(chain.documents) for found in each["gold"]}
    f1 = {"student": f1_of(student.found, gold)} | ({"dense": f1_of(dense.found, gold)} if dense else {})
    close = f1_of(student.found, dense.found) if dense else None
    return ChainScore(chain.name, len(chain.documents), f1, close, steps)


def f1_of(found: set[Thread], wanted: set[Thread]) -> float:
    """2 hits / (found + wanted); 1 where nothing is wanted and nothing found."""
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0
