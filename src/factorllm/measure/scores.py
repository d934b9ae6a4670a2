"""`factorllm eval`: tasks, perplexity and agreement of a student and of its dense model, each measured once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache as once
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import xxhash
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense import open_model
from factorllm.dense.safetensors import open_folder, read_tokenizer
from factorllm.errors import FactorLLMError
from factorllm.measure.agreement import Agreement, on_text
from factorllm.measure.chain.answers import LoadedAnswers
from factorllm.measure.chain.measure import measure_chain
from factorllm.measure.chain.plan import read_chain
from factorllm.measure.chain.run import Ask, ChainScore
from factorllm.measure.gguf_subject import Followed, GgufSubject, check_gguf
from factorllm.measure.perplexity import perplexity, refuse_infinite
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, check_tasks, definition, run_task
from factorllm.measure.vocabulary import Vocabulary, check_vocabularies
from factorllm.runs.device import usable_device
from factorllm.runs.digest import digest_of
from factorllm.runs.memory import available_memory
from factorllm.runs.progress import meter
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import write_json
from factorllm.student.adapters import adapter_files
from factorllm.student.read import load_student, read_provenance
from factorllm.text.calibration import file_digest, hold_out
from factorllm.text.parts import open_text

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "factorllm" / "scores"
"""Where scores are kept, by what they were measured on."""

_MEMORY_OF_A_BYTE = 2
"""Bytes that a byte of a file takes at most while it is asked, its context with it."""

Measured = TypeVar("Measured", Score, Followed)

_DECIDING = {
    "factorllm": "factorllm",
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "lm-eval": "lm_eval",
}
"""Packages whose versions decide a score, and their modules."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        scores: by model (`student`, `dense`) and task.
        perplexity: by model, when a text was given.
        agreement: of the student with the dense model, when both and a text were given.
        chain: what came of a chain, when one was given.
    """

    scores: dict[str, dict[str, Score]]
    perplexity: dict[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None
    chain: ChainScore | None = None


def evaluate(
    student: Path,
    *,
    against: str | None = None,
    text: str | None = None,
    chain: str | Path | None = None,
    dense_prompt: bool = False,
    settings: EvalSettings | None = None,
    cache: Path = CACHE,
    console: Console | None = None,
) -> Evaluation:
    """Score a student, and the dense model `against`.

    Scores come from the cache where all that decides them is the same.

    Args:
        student: a checkpoint's folder, or any model's `.gguf` file, which is then asked through llama.cpp.
        against: a dense model; beside a `.gguf` file, another one.
        text: a text to measure perplexity and agreement on, as for `factorize`; the part is used that the student's
            `factorize` holds out, or for a `.gguf` file, which does not say how it was made, one with default settings.
        chain: a YAML file of questions that hold the answers to earlier ones, or `emotion-cause`.
        dense_prompt: of `.gguf` files: `against` reads the student's prompts too, as `serve --dense-prompt` has it.

    Raises:
        FactorLLMError: for an unknown task, a file that cannot be read, or a damaged checkpoint.

    Example:
        >>> found = evaluate(Path("student"), against="dense", text="my-text.txt", settings=EvalSettings(tasks=()))
        >>> sorted(found.perplexity)
        ['dense', 'student']
    """
    console, settings = console or Console(quiet=True), settings or EvalSettings()
    if not settings.tasks and text is None and chain is None:
        raise FactorLLMError("there is nothing to measure; name some --tasks, or give a --text or a --chain")
    check_tasks(settings.tasks, settings.data, settings.run_generated_code)
    linked = None if chain is None else read_chain(chain)
    if dense_prompt:
        _check_dense_prompt(student, against)
    measure = partial(_of_gguf, dense_prompt) if student.suffix == ".gguf" else _of_checkpoint
    subjects, found = measure(student, against, text, settings, cache, console)
    if linked is None:
        return found
    answers = {name: cache / f"answers-{_digest_of_parts(each)}.json" for name, each in subjects.items()}
    return replace(found, chain=measure_chain(linked, subjects, answers, console))


def _check_dense_prompt(student: Path, against: str | None) -> None:
    if student.suffix != ".gguf":
        raise FactorLLMError("--dense-prompt is for .gguf files; `factorllm export` writes them")
    if not against:
        raise FactorLLMError("--dense-prompt lets the dense model read the prompts; name its file with --against")


def _of_checkpoint(
    student: Path, against: str | None, text: str | None, settings: EvalSettings, cache: Path, console: Console
) -> tuple[dict[str, _Subject], Evaluation]:
    settings = settings.model_copy(update={"device": usable_device(settings.device)})
    made = read_provenance(student)
    subjects = {"student": _Subject.of_student(student, settings)}
    if against:
        subjects["dense"] = _Subject.of_dense(against, settings)
    if text is not None:
        check_vocabularies({name: subject.vocabulary for name, subject in subjects.items()})
        tokens = _held_out(subjects["student"].tokenizer, text, Settings(**made["settings"]))
    scores = {name: scores_of(subject, name, settings, cache, console) for name, subject in subjects.items()}
    return subjects, Evaluation(scores) if text is None else _on_text(scores, subjects, tokens, console)


def _of_gguf(
    dense_prompt: bool,
    student: Path,
    against: str | None,
    text: str | None,
    settings: EvalSettings,
    cache: Path,
    console: Console,
) -> tuple[dict[str, GgufSubject], Evaluation]:
    check_gguf(against, settings)
    subjects = {"student": GgufSubject.of(student)} | ({"dense": GgufSubject.of(Path(against))} if against else {})
    asked = subjects | ({"student": subjects["student"].read_by(subjects["dense"])} if dense_prompt else {})
    if text is not None:
        check_vocabularies({name: subject.vocabulary for name, subject in subjects.items()})
        tokens = subjects["student"].held_out(text)
    scores = scores_of_files(asked, settings, cache, console)
    if text is None:
        return asked, Evaluation(scores)
    with meter(console, "measuring perplexity", len(tokens) * len(subjects)) as bar:
        followed = {name: follow_text(subject, tokens, cache, bar.advance) for name, subject in subjects.items()}
    found = {name: each.perplexity for name, each in followed.items()}
    close = followed["student"].agreement(followed["dense"]) if against else None
    return asked, Evaluation(scores, found, close)


def _on_text(scores: dict[str, Any], subjects: dict[str, _Subject], tokens: Tensor, console: Console) -> Evaluation:
    student, dense = subjects["student"], subjects.get("dense")
    close = None
    with meter(console, "measuring perplexity", len(tokens) * len(subjects)) as bar:
        if dense is None:
            values = {"student": perplexity(student.model, tokens, bar.advance)}
        else:
            values, close = on_text(dense.model, student.model, tokens, lambda rows: bar.advance(2 * rows))
    refuse_infinite(values, "use --dtype float32, or leave out --text")
    return Evaluation(scores, values, close)


@dataclass(frozen=True)
class _Subject:
    """A model that is loaded when it is first needed.

    Attributes:
        fingerprint: of its config, its weights, its tokenizer, how it generates, and of the precision.
        vocabulary: its tokens.
    """

    fingerprint: tuple[str, ...]
    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()

    @contextmanager
    def scoring(self, settings: EvalSettings, _threads: int | None = None) -> Iterator[Callable[[str], Score]]:
        allowed = settings.run_generated_code
        yield lambda task: run_task(self.model, self.tokenizer, task, settings.data, settings.limit, allowed)

    @contextmanager
    def answering(self) -> Iterator[Ask]:
        yield LoadedAnswers(self.model, self.tokenizer)

    @classmethod
    def of_student(cls, folder: Path, settings: EvalSettings) -> _Subject:
        tokenizer, (config, _, _) = read_tokenizer(folder, str(folder)), open_folder(folder, str(folder))
        generation = folder / "generation_config.json"
        weights = digest_of([folder / "config.json", *sorted(folder.glob("*.safetensors")), *adapter_files(folder)])
        said = digest_of([generation] if generation.exists() else [])

        def load() -> PreTrainedModel:
            return load_student(folder, getattr(torch, settings.dtype), settings.device)

        key = (weights, _digest(tokenizer), said, *_computed_in(settings))
        return cls(key, Vocabulary.of(config.vocab_size, tokenizer.get_vocab()), tokenizer, load)

    @classmethod
    def of_dense(cls, model: str, settings: EvalSettings) -> _Subject:
        source = open_model(model)
        tokenizer, said = source.tokenizer(), source.generation_config().to_json_string()

        def load() -> PreTrainedModel:
            return source.load_model(getattr(torch, settings.dtype), torch.device(settings.device))

        key = (source.fingerprint, _digest(tokenizer), said, *_computed_in(settings))
        return cls(key, Vocabulary.of(source.config.vocab_size, tokenizer.get_vocab()), tokenizer, load)


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 of all files that a tokenizer is saved as, its chat template among them."""
    with TemporaryDirectory(prefix="factorllm-") as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return digest_of(files, " ".join(path.name for path in files).encode())


def _computed_in(settings: EvalSettings) -> tuple[str, str]:
    return settings.dtype, torch.device(settings.device).type


def scores_of_files(
    subjects: Mapping[str, GgufSubject], settings: EvalSettings, cache: Path, console: Console
) -> dict[str, dict[str, Score]]:
    """The scores of several files, each loaded once, side by side: one token at a time of one model keeps few cores
    busy, and while its answers are counted the others go on. Where they do not fit into memory, one after the other.

    Raises:
        FactorLLMError: of the first that cannot be scored.
    """
    asked = [each for each in subjects.values() if not _is_cached(each, settings, cache)]
    sizes = {name: each.size for name, each in subjects.items()}
    cores = torch.get_num_threads()
    fit = cores > 1 and _MEMORY_OF_A_BYTE * sum(each.size for each in asked) < available_memory()
    workers = max(min(len(asked), 2 * cores), 1) if fit else 1
    threads = max(cores // workers, 1) if workers > 1 else None
    with ThreadPoolExecutor(workers) as pool:
        running = {
            name: pool.submit(scores_of, subjects[name], name, settings, cache, console, threads)
            for name in sorted(subjects, key=sizes.__getitem__, reverse=True)  # what takes longest goes first
        }
        return {name: running[name].result() for name in subjects}


def _is_cached(subject: GgufSubject, settings: EvalSettings, cache: Path) -> bool:
    return all(_file_of(subject, task, settings, cache).exists() for task in settings.tasks)


def scores_of(
    subject: _Subject | GgufSubject,
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
            console.print(f"{name}: {task}")
            return load()(task)

        return {
            task: _once(_file_of(subject, task, settings, cache), Score, partial(ask, task)) for task in settings.tasks
        }


def follow_text(
    subject: GgufSubject, tokens: Tensor, cache: Path, tick: Callable[[int], None] = lambda sequences: None
) -> Followed:
    """What a file's model says of a text, (sequences, length), int64; from the cache where it was asked before.

    Args:
        tick: called with the number of sequences after each batch.
    """
    key = xxhash.xxh3_128(json.dumps([subject.fingerprint, tokens.tolist()]).encode()).hexdigest()
    return _once(cache / f"{key}.json", Followed, partial(subject.follow, tokens, tick))


def _once(path: Path, kind: type[Measured], measure: Callable[[], Measured]) -> Measured:
    """What is cached in a file, or else is measured now."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError):  # not there, or damaged
        found = measure()
    with suppress(OSError):  # without a cache it takes longer, and that is all
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    return found


def _file_of(subject: _Subject | GgufSubject, task: str, settings: EvalSettings, cache: Path) -> Path:
    """Where a score is cached, by everything that decides it."""
    data = settings.data
    questions = file_digest(str(data / f"{task}.jsonl")) if data else "hub"
    return cache / f"{_digest_of_parts(subject, definition(task, data is not None), questions, settings.limit)}.json"


def _digest_of_parts(subject: _Subject | GgufSubject, *asked: object) -> str:
    """Of a model, of the packages that decide what it says, and of what it is asked."""
    versions = [version(package) if find_spec(module) else None for package, module in _DECIDING.items()]
    return xxhash.xxh3_128(json.dumps([subject.fingerprint, *asked, versions]).encode()).hexdigest()


def _held_out(tokenizer: PreTrainedTokenizerBase, text: str, made_with: Settings) -> Tensor:
    """The part of a text that `factorize` with the same settings holds out."""
    return hold_out(open_text(text, tokenizer, made_with), made_with)
