"""`factorllm eval`: tasks, perplexity and agreement of a student and of its dense model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from factorllm.errors import FactorLLMError
from factorllm.measure.agreement import Agreement, on_text
from factorllm.measure.chain.measure import measure_chain
from factorllm.measure.chain.plan import read_chain
from factorllm.measure.chain.run import ChainScore
from factorllm.measure.checkpoint_subject import CheckpointSubject
from factorllm.measure.gguf_subject import GgufSubject, check_gguf
from factorllm.measure.perplexity import perplexity, refuse_infinite
from factorllm.measure.score_cache import CACHE, digest_of_parts, follow_text, scores_of, scores_of_files
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, check_tasks
from factorllm.measure.vocabulary import check_vocabularies
from factorllm.runs.apart import apart
from factorllm.runs.device import usable_device
from factorllm.runs.given import given, given_if_any, given_settings
from factorllm.runs.progress import meter
from factorllm.runs.settings import Settings
from factorllm.student.read import read_provenance, refuse_text_of_kinds
from factorllm.text.calibration import hold_out
from factorllm.text.parts import open_text


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


@apart()
def evaluate(
    student: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    chain: str | Path | None = None,
    dense_prompt: bool = False,
    settings: EvalSettings | None = None,
    cache: str | Path = CACHE,
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
        >>> found = evaluate("student", against="dense", text="my-text.txt", settings=EvalSettings(tasks=()))
        >>> sorted(found.perplexity)
        ['dense', 'student']
    """
    console, settings = console or Console(quiet=True), given_settings(settings, EvalSettings())
    student, cache = Path(given(student)), Path(given(cache))
    against, text, chain = map(given_if_any, (against, text, chain))
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
    answers = {name: cache / f"answers-{digest_of_parts(each)}.json" for name, each in subjects.items()}
    return replace(found, chain=measure_chain(linked, subjects, answers, console))


def _check_dense_prompt(student: Path, against: str | None) -> None:
    if student.suffix != ".gguf":
        raise FactorLLMError("--dense-prompt is for .gguf files; `factorllm export` writes them")
    if not against:
        raise FactorLLMError("--dense-prompt lets the dense model read the prompts; name its file with --against")


def _of_checkpoint(
    student: Path, against: str | None, text: str | None, settings: EvalSettings, cache: Path, console: Console
) -> tuple[dict[str, CheckpointSubject], Evaluation]:
    settings = settings.model_copy(update={"device": usable_device(settings.device)})
    made = read_provenance(student)
    refuse_text_of_kinds(student, made, text)
    subjects = {"student": CheckpointSubject.of_student(student, settings)}
    if against:
        subjects["dense"] = CheckpointSubject.of_dense(against, settings)
    if text is not None:
        check_vocabularies({name: subject.vocabulary for name, subject in subjects.items()})
        made_with = Settings(**made["settings"])
        tokens = hold_out(open_text(text, subjects["student"].tokenizer, made_with), made_with)
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


def _on_text(
    scores: dict[str, Any], subjects: dict[str, CheckpointSubject], tokens: Tensor, console: Console
) -> Evaluation:
    student, dense = subjects["student"], subjects.get("dense")
    close = None
    with meter(console, "measuring perplexity", len(tokens) * len(subjects)) as bar:
        if dense is None:
            values = {"student": perplexity(student.model, tokens, bar.advance)}
        else:
            values, close = on_text(dense.model, student.model, tokens, lambda rows: bar.advance(2 * rows))
    refuse_infinite(values, "use --dtype float32, or leave out --text")
    return Evaluation(scores, values, close)
