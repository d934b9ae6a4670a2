"""Everything that the report says: read from the checkpoint, and measured on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense import open_model
from factorllm.dense.safetensors import read_tokenizer
from factorllm.errors import FactorLLMError, refusing
from factorllm.measure.generate import complete
from factorllm.measure.routing import Specialisation, expert_picks_for, specialisation
from factorllm.measure.tasks import TASKS, Score
from factorllm.runs.device import usable_device
from factorllm.runs.progress import meter
from factorllm.student.read import load_student, read_provenance
from factorllm.student.routers import Routers

_INSTEAD = "give the file that factorllm eval -o wrote with --scores, and speed.json of bench -o with --speed"

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
)
"""What sample generations start from."""


@dataclass(frozen=True)
class Sample:
    """Greedy continuations of one prompt; `dense` is None where no dense model was given."""

    prompt: str
    student: str
    dense: str | None


@dataclass(frozen=True)
class Findings:
    """What a report is made of.

    Attributes:
        made: the content of `factorllm.json`.
        specialisation: None for a static prune, which has no experts.
        scores: by model and task, if what `factorllm eval -o` wrote was given.
        speed: decode speed at batch 1, x dense, by model, if what `factorllm bench -o` wrote was given.
    """

    made: dict
    specialisation: Specialisation | None
    samples: list[Sample]
    scores: dict[str, dict[str, Score]] | None
    speed: dict[str, float] | None


def gather(
    checkpoint: Path, against: str | None, scores: Path | None, speed: Path | None, device: str, console: Console
) -> Findings:
    """Read what is known of a checkpoint, run it on texts of several kinds, and let it write.

    Args:
        against: the dense model, for its continuations beside the student's.

    Raises:
        FactorLLMError: for a checkpoint or file that cannot be read.
    """
    made = read_provenance(checkpoint)
    read = {"scores": _scores(scores), "speed": _decode_speed(speed)}
    device = usable_device(device)
    tokenizer, student = read_tokenizer(checkpoint, str(checkpoint)), load_student(checkpoint, device=device)
    kinds = _kinds(tokenizer)
    models = [student]
    if against:
        models.append(_dense(against, student, device))
    routers = Routers(student)
    with meter(console, "running the student for the report", len(kinds) + len(models) * len(PROMPTS)) as bar:
        special = None
        if routers.modules:
            picks = {}
            for kind, tokens in kinds.items():
                picks[kind] = expert_picks_for(student, routers, tokens)
                bar.advance()
            special = specialisation(picks)
        samples = []
        for prompt in PROMPTS:
            continued = [_continued(model, tokenizer, prompt) for model in models]
            samples.append(Sample(prompt, continued[0], continued[1] if against else None))
            bar.advance(len(models))
    return Findings(made, special, samples, **read)


def _continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return complete(model, tokenizer, prompt).removeprefix(prompt).strip()


def _kinds(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Tokens of a text of each kind, all of the same number: (n,)."""
    texts = json.loads(files("factorllm.report").joinpath("kinds.json").read_text(encoding="utf-8"))
    tokens = {kind: tokenizer(text, return_tensors="pt").input_ids[0] for kind, text in texts.items()}
    shortest = min(map(len, tokens.values()))
    return {kind: row[:shortest] for kind, row in tokens.items()}


def _dense(against: str, student: PreTrainedModel, device: str) -> PreTrainedModel:
    source = open_model(against)
    if source.config.vocab_size != student.config.vocab_size:
        raise FactorLLMError(
            f"{against} knows {source.config.vocab_size} tokens and the student {student.config.vocab_size}, so it is "
            "not the model that the student was made from; give that one with --against"
        )
    return source.load_model(torch.float32, torch.device(device))


def _scores(path: Path | None) -> dict[str, dict[str, Score]] | None:
    if path is None:
        return None
    found = _read(path, _ScoresFile).scores
    student = found.get("student", {"": None})
    if not found.get("dense", student).keys() >= student.keys() <= TASKS.keys():
        raise FactorLLMError(f"{path} has no scores of a student, and of its dense model on the same tasks; {_INSTEAD}")
    return found


def _decode_speed(path: Path | None) -> dict[str, float] | None:
    if path is None:
        return None
    models = _read(path, _SpeedFile).models
    found = {model.name: speeds[0] for model in models if (speeds := model.ratio_to_dense.get("decode x1"))}
    if not found:
        raise FactorLLMError(f"{path} has no decode speed at batch 1; run factorllm bench with --batch 1")
    return found


_File = TypeVar("_File", bound=BaseModel)


class _ScoresFile(BaseModel):
    scores: dict[str, dict[str, Score]]


class _TimedModel(BaseModel):
    name: str
    ratio_to_dense: dict[str, list[float]]


class _SpeedFile(BaseModel):
    models: list[_TimedModel]


def _read(path: Path, kind: type[_File]) -> _File:
    with refusing(path, _INSTEAD):
        return kind.model_validate_json(path.read_bytes())
