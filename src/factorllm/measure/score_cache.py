"""Scores of models, each measured once: kept by everything that decides them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import cache as once
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
import xxhash
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor

from factorllm.measure.checkpoint_subject import CheckpointSubject
from factorllm.measure.gguf_subject import Followed, GgufSubject
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, definition
from factorllm.runs.memory import available_memory
from factorllm.runs.workspace import write_json
from factorllm.text.calibration import file_digest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "factorllm" / "scores"
"""Where scores are kept, by what they were measured on."""

_MEMORY_OF_A_BYTE = 2
"""Bytes that a byte of a file takes at most while it is asked, its context with it."""

Cached = TypeVar("Cached")

_DECIDING = {
    "factorllm": "factorllm",
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "lm-eval": "lm_eval",
}
"""Packages whose versions decide a score, and their modules."""


def scores_of_files(
    subjects: Mapping[str, GgufSubject], settings: EvalSettings, cache: Path, console: Console
) -> dict[str, dict[str, Score]]:
    """The scores of several files, each loaded once, side by side: one token at a time of one model keeps few cores
    busy, and while its answers are counted the others go on. Where they do not fit into memory, one after the other.

    Raises:
        FactorLLMError: of the first that cannot be scored.
    """
    asked = [each for each in subjects.values() if not _is_cached(each, settings, cache)]
    cores = torch.get_num_threads()
    fit = cores > 1 and _MEMORY_OF_A_BYTE * sum(each.size for each in asked) < available_memory()
    workers = max(min(len(asked), 2 * cores), 1) if fit else 1
    threads = max(cores // workers, 1) if workers > 1 else None
    with ThreadPoolExecutor(workers) as pool:
        running = {
            name: pool.submit(scores_of, subjects[name], name, settings, cache, console, threads)
            for name in sorted(subjects, key=lambda name: subjects[name].size, reverse=True)  # the slowest go first
        }
        return {name: running[name].result() for name in subjects}


def _is_cached(subject: GgufSubject, settings: EvalSettings, cache: Path) -> bool:
    return all(_file_of(subject, task, settings, cache).exists() for task in settings.tasks)


def scores_of(
    subject: CheckpointSubject | GgufSubject,
    name: str,
    settings: EvalSettings,
    cache: Path,
    console: Console,
    threads: int | None = None,
) -> dict[str, Score]:
    """The scores of one model, one task at a time, so that an interrupted run keeps what it has.

    Args:
        name: of the model, for the console.
        threads: of llama.cpp; None leaves them to it.
    """
    with ExitStack() as stack:
        load = once(lambda: stack.enter_context(subject.scoring(settings, threads)))

        def ask(task: str) -> Score:
            console.print(f"{name}: {task}", markup=False)  # brackets are parts of names
            return load()(task)

        return {
            task: _once(_file_of(subject, task, settings, cache), Score, partial(ask, task)) for task in settings.tasks
        }


def follow_text(subject: GgufSubject, tokens: Tensor, cache: Path, tick: Callable[[int], None]) -> Followed:
    """What a file's model says of a text, (sequences, length), int64; from the cache where it was asked before.

    Args:
        tick: called with the number of sequences after each batch.
    """
    key = xxhash.xxh3_128(json.dumps([subject.fingerprint, tokens.tolist()]).encode()).hexdigest()
    return _once(cache / f"{key}.json", Followed, partial(subject.follow, tokens, tick))


def _once(path: Path, kind: type[Cached], measure: Callable[[], Cached]) -> Cached:
    """What is cached in a file, or else is measured now."""
    found = read_cached(path, kind)
    if found is None:
        found = measure()
        write_cached(path, asdict(found))
    return found


def read_cached(path: Path, kind: type[Cached]) -> Cached | None:
    """What a file of the cache holds; None where it is not there, or damaged."""
    with suppress(OSError, ValueError):
        return TypeAdapter(kind).validate_json(path.read_bytes())
    return None


def write_cached(path: Path, content: dict) -> None:
    """Write a file of the cache; without one it takes longer, and that is all."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def _file_of(subject: CheckpointSubject | GgufSubject, task: str, settings: EvalSettings, cache: Path) -> Path:
    """Where a score is cached, by everything that decides it."""
    data = settings.data
    questions = file_digest(str(data / f"{task}.jsonl")) if data else "hub"
    return cache / f"{digest_of_parts(subject, definition(task, data is not None), questions, settings.limit)}.json"


def digest_of_parts(subject: CheckpointSubject | GgufSubject, *asked: object) -> str:
    """Of a model, of the packages that decide what it says, and of what it is asked."""
    versions = [version(package) if find_spec(module) else None for package, module in _DECIDING.items()]
    return xxhash.xxh3_128(json.dumps([subject.fingerprint, *asked, versions]).encode()).hexdigest()
