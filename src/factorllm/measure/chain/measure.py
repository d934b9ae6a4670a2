"""A chain, asked of a student and of its dense model; each question is asked once, also over several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import xxhash
from rich.console import Console

from factorllm.measure.chain.plan import Chain, Question
from factorllm.measure.chain.run import Ask, ChainScore, Followed, StepScore, compare, follow, score
from factorllm.measure.score_cache import read_cached, write_cached
from factorllm.runs.progress import meter


class Subject(Protocol):
    """A model that can be asked."""

    def answering(self) -> AbstractContextManager[Ask]: ...


class Remembered:
    """A model that is loaded for the first question whose answer is in no file. A context manager, which writes it.

    Args:
        path: JSON of answers by question.
    """

    def __init__(self, subject: Subject, path: Path):
        self._subject, self._path, self._opened = subject, path, ExitStack()
        self._ask: Ask | None = None
        self._known = read_cached(path, dict[str, str]) or {}

    def __enter__(self) -> Remembered:
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()
        if self._ask:
            write_cached(self._path, self._known)

    def __call__(self, question: Question) -> str:
        key = xxhash.xxh3_128(json.dumps([question.prompt, question.allowed]).encode()).hexdigest()
        if key not in self._known:
            self._ask = self._ask or self._opened.enter_context(self._subject.answering())
            self._known[key] = self._ask(question)
        return self._known[key]


def measure_chain(
    chain: Chain, subjects: Mapping[str, Subject], answers: Mapping[str, Path], console: Console
) -> ChainScore:
    """Ask all of a chain.

    Args:
        subjects: `student`, and `dense` if there is one.
        answers: the files of their answers.

    Raises:
        FactorLLMError: when a prompt is longer than a model's context, or a model cannot answer.
    """
    followed: dict[str, Followed] = {}
    steps: list[StepScore] = []
    turns = 3 if "dense" in subjects else 1  # the student is asked the dense model's questions, too
    with meter(console, f"asking {chain.name}", len(chain.documents) * turns) as bar:
        for name in sorted(subjects):  # the dense model first
            with Remembered(subjects[name], answers[name]) as ask:
                followed[name] = follow(chain, ask, bar.advance)
                if name == "student" and "dense" in followed:
                    steps = compare(chain, followed["student"], followed["dense"], ask, bar.advance)
    return score(chain, followed["student"], followed.get("dense"), steps)
