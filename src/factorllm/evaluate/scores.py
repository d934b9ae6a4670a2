"""`factorllm eval`: tasks, perplexity and agreement of a student and of its dense model, each measured once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import xxhash
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.checkpoint import write_json
from factorllm.evaluate.agreement import Agreement, agreement
from factorllm.evaluate.perplexity import perplexity
from factorllm.evaluate.tasks import Score, check_tasks, run_task
from factorllm.inspection import load_student, read_provenance
from factorllm.progress import meter
from factorllm.settings import Settings
from factorllm.sources import open_model
from factorllm.sources.digest import digest_of
from factorllm.sources.parts import open_text
from factorllm.sources.safetensors import read_tokenizer
from factorllm.sources.text import file_digest, hold_out

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "factorllm" / "scores"
"""Where scores are kept, by what they were measured on."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        scores: by model (`student`, `dense`) and task.
        perplexity: by model, when a text was given.
        agreement: of the student with the dense model, when both and a text were given.
    """

    scores: dict[str, dict[str, Score]]
    perplexity: dict[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None


def evaluate(
    student: Path,
    *,
    against: str | None = None,
    tasks: list[str],
    data: Path | None = None,
    limit: int | None = None,
    text: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    cache: Path = CACHE,
    console: Console | None = None,
) -> Evaluation:
    """Score a student, and the dense model `against`.

    Args:
        tasks: names of `tasks.TASKS`; scores come from the cache if the same weights were scored on the same questions.
        data: folder of `<task>.jsonl`; None for lm-eval's own data.
        limit: questions of each task; None for all.
        text: a text to measure perplexity and agreement on, as for `factorize`; its held-out part is used.

    Raises:
        FactorLLMError: for an unknown task, a file that cannot be read, or a damaged checkpoint.
    """
    console = console or Console(quiet=True)
    check_tasks(tasks, data)
    made = read_provenance(student)
    subjects = {"student": _Subject.of_student(student, device, dtype)}
    if against:
        subjects["dense"] = _Subject.of_dense(against, device, dtype)
    scores = {name: _scores(subject, name, tasks, data, limit, cache, console) for name, subject in subjects.items()}
    if text is None:
        return Evaluation(scores)
    tokens = _held_out(subjects["student"].tokenizer, text, Settings(**made["settings"]))
    with meter(console, "measuring perplexity", len(tokens) * len(subjects)) as bar:
        values = {name: perplexity(subject.model, tokens, bar.advance) for name, subject in subjects.items()}
    if not against:
        return Evaluation(scores, values)
    with meter(console, "comparing next tokens", len(tokens)) as bar:
        return Evaluation(
            scores, values, agreement(subjects["dense"].model, subjects["student"].model, tokens, bar.advance)
        )


@dataclass(frozen=True)
class _Subject:
    """A model that is loaded when it is first needed.

    Attributes:
        fingerprint: of its weights and of the precision.
    """

    fingerprint: str
    load: Callable[[], PreTrainedModel]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.load_tokenizer()

    @classmethod
    def of_student(cls, folder: Path, device: str, dtype: str) -> _Subject:
        digest = digest_of([folder / "config.json", *sorted(folder.glob("*.safetensors"))])

        def load() -> PreTrainedModel:
            return load_student(folder, getattr(torch, dtype), device)

        return cls(f"{digest} {dtype}", load, lambda: read_tokenizer(folder, str(folder)))

    @classmethod
    def of_dense(cls, model: str, device: str, dtype: str) -> _Subject:
        source = open_model(model)

        def load() -> PreTrainedModel:
            return source.load_model(getattr(torch, dtype), torch.device(device))

        return cls(f"{source.fingerprint} {dtype}", load, source.tokenizer)


def _scores(
    subject: _Subject,
    name: str,
    tasks: list[str],
    data: Path | None,
    limit: int | None,
    cache: Path,
    console: Console,
) -> dict[str, Score]:
    """One task at a time, so that an interrupted run keeps what it has."""
    found = {}
    for task in tasks:
        path = cache / f"{_key(subject, task, data, limit)}.json"
        if path.exists():
            found[task] = Score(**json.loads(path.read_text(encoding="utf-8")))
            continue
        console.print(f"{name}: {task}")
        found[task] = run_task(subject.model, subject.tokenizer, task, data, limit)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found[task]))
    return found


def _key(subject: _Subject, task: str, data: Path | None, limit: int | None) -> str:
    try:
        harness = version("lm-eval")
    except PackageNotFoundError:
        harness = None
    questions = file_digest(str(data / f"{task}.jsonl")) if data else "hub"
    return xxhash.xxh3_128(json.dumps([subject.fingerprint, task, questions, limit, harness]).encode()).hexdigest()


def _held_out(tokenizer: PreTrainedTokenizerBase, text: str, made_with: Settings) -> Tensor:
    """The part of a text that `factorize` with the same settings holds out."""
    return hold_out(open_text(text, tokenizer, made_with), made_with)
