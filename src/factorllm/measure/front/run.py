"""One front from end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor

from factorllm.dense.families import is_dense
from factorllm.engines import check_installed
from factorllm.errors import FactorLLMError
from factorllm.exporting import FILE_TYPES
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.ggml import WEIGHTED
from factorllm.exporting.gptq import LEVELS
from factorllm.exporting.importance import WeighOnce
from factorllm.exporting.plan import file_types
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.front.points import Front, Kind, Point, Timed
from factorllm.measure.front.show import front_json, write_picture
from factorllm.measure.gguf_subject import Followed, GgufSubject, check_gguf
from factorllm.measure.score_cache import CACHE, follow_text, scores_of_files
from factorllm.measure.settings import EvalSettings
from factorllm.measure.speed.subjects import Subject, open_timed, prepare_subject
from factorllm.measure.speed.timing import Measure, measure_speed
from factorllm.measure.tasks import Score, check_tasks
from factorllm.measure.vocabulary import Vocabulary
from factorllm.runs.apart import apart
from factorllm.runs.digest import digest_of
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.given import given, given_settings, given_several
from factorllm.runs.output import PROVENANCE, check_own_files, located, read_json, trimmed_from
from factorllm.runs.progress import meter
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import write_json
from factorllm.student.read import read_provenance, refuse_text_of_kinds
from factorllm.text.parts import sequences_of

NUMBERS, PICTURE = "front.json", "front.png"

_WHEN_FULL = "free some, or choose another -o"

REFERENCE = "q8_0"
"""The dense model's file that all speeds are told against."""


@dataclass(frozen=True)
class _Model:
    name: str
    kind: Kind
    checkpoint: Checkpoint = field(compare=False)
    path: str


@apart()
def run_front(
    students: Sequence[str | Path],
    against: Sequence[str | Path],
    text: str | Path,
    out: str | Path,
    plan: FrontPlan | None = None,
    settings: EvalSettings | None = None,
    cache: str | Path = CACHE,
    console: Console | None = None,
) -> Front:
    """Write every model in every type to `out`, weighed by the text, and measure each file through llama.cpp.

    Each type is timed in turns, with the dense model's q8_0 among them. What was written or measured is not done again,
    so an interrupted front goes on. `front.json` and `front.png` are written last.

    Args:
        against: the dense model first, then static prunes.
        text: as for `factorize`.
        settings: tasks that each file is asked; None for no tasks.

    Raises:
        FactorLLMError: when a model, the text or llama.cpp cannot be used.

    Example:
        >>> short = {"importance_tokens": 64, "perplexity_tokens": 64, "prompt": 8, "context": 8, "steps": 2}
        >>> plan = FrontPlan(types=("q8_0",), rounds=2, **short)
        >>> front = run_front(["student"], ["dense"], "my-text.txt", "front", plan)
        >>> [(point.model, point.kind) for point in front.points]
        [('dense', 'dense'), ('student', 'student')]
    """
    plan, settings = given_settings(plan, FrontPlan()), given_settings(settings, EvalSettings(tasks=()))
    text, cache, out, console = given(text), Path(given(cache)), located(out), console or Console(quiet=True)
    models = _models(given_several("students", students, least=0), given_several("against", against))
    for model in models:
        if (Path(model.path) / PROVENANCE).is_file():
            refuse_text_of_kinds(model.path, read_provenance(Path(model.path)), text)
    made_with = _held_out_by(models)
    _check(out, plan, settings)
    plan = plan.fitting(min(model.checkpoint.config.max_position_embeddings for model in models))
    with explain_full_disk(out, _WHEN_FULL):
        out.mkdir(parents=True, exist_ok=True)
        weights = {"text": text, "tokens": plan.importance_tokens, "made_with": made_with}
        files = {(model, kind): file for model in models for kind, file in _write(model, weights, out, plan, console)}
        said = _ask(files, text, made_with, plan, settings, cache, console)
        timed = {kind: _time(kind, files, out, plan, console) for kind in plan.types}
        points = [
            _point(model, kind, file, timed[kind][model.name], *said[file.path])
            for (model, kind), file in files.items()
            if kind in plan.types
        ]
        front = Front(points, text, plan, settings)
        write_json(out / NUMBERS, front_json(front))
        write_picture(points, out / PICTURE)
    return front


def _models(students: Sequence[str], against: Sequence[str]) -> list[_Model]:
    """The dense model, then students, then prunes; among either, trimmed models.

    Raises:
        FactorLLMError: when one is not what it is given as, or two have one name.
    """
    given: list[tuple[Kind, Sequence[str]]] = [
        ("dense", against[:1]),
        ("student", students),
        ("static prune", against[1:]),
    ]
    models = [
        _Model(_name(path), _kind(path, kind), open_timed(path, "llamacpp"), path)
        for kind, paths in given
        for path in paths
    ]
    for model in models:
        dense = is_dense(model.checkpoint.config)
        if dense == (model.kind == "student"):
            raise FactorLLMError(
                f"{model.path} is {'a dense or pruned model' if dense else 'a student'}; give students first, and "
                "with --against the dense model and static prunes"
            )
    names = [model.name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FactorLLMError(f"two models are called {twice}, and files are called by their models; rename one")
    return models


def _kind(path: str, given_as: Kind) -> Kind:
    return "trimmed" if given_as != "dense" and trimmed_from(path) is not None else given_as


def _held_out_by(models: list[_Model]) -> Settings:
    """Settings of which the held-out part of the text is new to all models.

    Raises:
        FactorLLMError: when they were made with others.
    """
    made = {model.name: model.checkpoint.settings() for model in models if model.kind not in ("dense", "trimmed")}
    if not made:
        return Settings()
    first, *others = made
    for name in others:
        for key in ("seed", "length", "held_out_tokens"):
            if getattr(made[first], key) != getattr(made[name], key):
                raise FactorLLMError(
                    f"{first} was made with {key} {getattr(made[first], key)} and {name} with "
                    f"{getattr(made[name], key)}, so no part of the text is new to both; make one of them again"
                )
    return made[first]


def _name(path: str) -> str:
    return Path(path).absolute().name.removesuffix(".gguf")


def _check(out: Path, plan: FrontPlan, settings: EvalSettings) -> None:
    """Refuse before the work what cannot be measured or written."""
    check_installed("llamacpp")
    file_types(plan.types)
    check_gguf(None, settings)
    check_tasks(settings.tasks, settings.data, settings.run_generated_code)
    names = (NUMBERS, PICTURE, *map(_timings, plan.types))
    check_own_files(out, names, _is_ours)


def _is_ours(folder: Path) -> bool:
    made = [read_json(folder / name) or {} for name in (NUMBERS, *map(_timings, FILE_TYPES))]
    return any({"points", "plan"} <= each.keys() or {"job", "timed"} <= each.keys() for each in made)


def _write(
    model: _Model, weights: dict[str, Any], out: Path, plan: FrontPlan, console: Console
) -> Iterator[tuple[str, Subject]]:
    """A model's files, by type; `weights` are arguments of `export_gguf` for types that heed importance."""
    weigh = WeighOnce()
    extra = [REFERENCE] if model.kind == "dense" and REFERENCE not in plan.types else []
    for kind in (*plan.types, *extra):
        weighted = weights if FILE_TYPES[kind][0] in WEIGHTED else {}
        if plan.gptq and FILE_TYPES[kind][0] in LEVELS:
            weighted = weights | {"gptq": True}
        written = (model.name, model.path, model.checkpoint, "llamacpp", kind, out, console, _WHEN_FULL)
        yield kind, prepare_subject(*written, weigh=weigh, **weighted)


def _ask(
    files: dict[tuple[_Model, str], Subject],
    text: str,
    made_with: Settings,
    plan: FrontPlan,
    settings: EvalSettings,
    cache: Path,
    console: Console,
) -> dict[Path, tuple[float, dict[str, Score]]]:
    """Perplexity and scores of each file that is on the front."""
    subjects = {
        f"{model.name} {kind}": GgufSubject.of(file.path) for (model, kind), file in files.items() if kind in plan.types
    }
    texts = _texts(subjects, text, made_with, plan)
    every = next(iter(texts.values()))  # the dense model's
    with meter(console, "measuring perplexity", len(every.tokens) * len(subjects)) as bar:
        followed = {
            name: follow_text(subject, texts[subject.vocabulary].tokens, cache, bar.advance)
            for name, subject in subjects.items()
        }
    scores = scores_of_files(subjects, settings, cache, console)
    return {
        subject.path: (texts[subject.vocabulary].perplexity(followed[name], every), scores[name])
        for name, subject in subjects.items()
    }


@dataclass(frozen=True)
class _Text:
    """A text in the tokens of some models.

    Attributes:
        tokens: (sequences, length), int64.
        bytes: of the text of all tokens but the first of each sequence.
    """

    tokens: Tensor
    bytes: int

    def perplexity(self, followed: Followed, dense: _Text) -> float:
        """For a token of the dense model's, whatever the model's own are: of equal losses for a byte, equal."""
        predicted, of_dense = (text.tokens[:, 1:].numel() for text in (self, dense))
        return followed.perplexity ** (predicted / self.bytes * dense.bytes / of_dense)


def _texts(
    subjects: dict[str, GgufSubject], text: str, made_with: Settings, plan: FrontPlan
) -> dict[Vocabulary, _Text]:
    """What perplexity is measured on, for each vocabulary; the dense model's is the first."""
    found: dict[Vocabulary, _Text] = {}
    for subject in subjects.values():
        if subject.vocabulary not in found:
            tokens = subject.held_out(text, made_with)
            tokens = tokens[: sequences_of(plan.perplexity_tokens, tokens.shape[1])]
            words = subject.tokenizer.batch_decode(tokens[:, 1:].tolist())
            found[subject.vocabulary] = _Text(tokens, sum(len(row.encode()) for row in words))
    return found


def _time(
    kind: str, files: dict[tuple[_Model, str], Subject], out: Path, plan: FrontPlan, console: Console
) -> dict[str, Timed]:
    """How fast the files of one type are, by model; timed in turns, the reference among them."""
    reference = next(file for (model, each), file in files.items() if model.kind == "dense" and each == REFERENCE)
    subjects = {model.name: file for (model, each), file in files.items() if each == kind}
    job = {
        "plan": plan.speed_plan().model_dump(mode="json"),
        "files": [digest_of([each.path]) for each in (reference, *subjects.values())],
    }
    path = out / _timings(kind)
    if (known := read_json(path)) and known.get("job") == job:
        return TypeAdapter(dict[str, Timed]).validate_python(known["timed"])
    measures = measure_speed([reference, *subjects.values()], "llamacpp", plan.speed_plan(), console)
    timed = {name: _against(measure, measures[0], plan) for name, measure in zip(subjects, measures[1:], strict=True)}
    write_json(path, {"job": job, "timed": {name: asdict(each) for name, each in timed.items()}})
    return timed


def _timings(kind: str) -> str:
    return f"speed-{kind}.json"


def _against(measure: Measure, reference: Measure, plan: FrontPlan) -> Timed:
    prefill, decode = plan.speed_plan().names()
    return Timed(measure.ratio(reference, prefill), measure.ratio(reference, decode))


def _point(model: _Model, kind: str, file: Subject, timed: Timed, perplexity: float, scores: dict[str, Score]) -> Point:
    bits = 8 * file.size / file.cost.total_parameters
    return Point(model.name, model.kind, kind, file.size, bits, timed, perplexity, scores)
