"""Everything that the report says: read from the checkpoint, and measured on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, one_line
from factorllm.evaluate import complete
from factorllm.evaluate.routing import Specialisation, expert_picks_for, specialisation
from factorllm.inspection import load_student, read_provenance
from factorllm.progress import meter
from factorllm.route.loaded import Routers
from factorllm.settings import torch_device
from factorllm.sources import open_model
from factorllm.sources.safetensors import read_tokenizer

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
        scores: what `factorllm eval -o` wrote, if given.
        speed: decode speed at batch 1, x dense, by model, if what `factorllm bench -o` wrote was given.
    """

    made: dict
    specialisation: Specialisation | None
    samples: list[Sample]
    scores: dict | None
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
    device = torch_device(device)
    made = read_provenance(checkpoint)
    read = {"scores": _read_json(scores, "scores"), "speed": _decode_speed(speed)}
    tokenizer, student = read_tokenizer(checkpoint, str(checkpoint)), load_student(checkpoint, device=device)
    kinds = _kinds(tokenizer)
    models = [student]
    if against:
        models.append(open_model(against).load_model(torch.float32, device))
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


def _decode_speed(path: Path | None) -> dict[str, float] | None:
    if (content := _read_json(path, "models")) is None:
        return None
    try:
        return {model["name"]: model["ratio_to_dense"]["decode x1"][0] for model in content["models"]}
    except KeyError:
        raise FactorLLMError(f"{path} has no decode speed at batch 1; run factorllm bench with --batch 1") from None


def _read_json(path: Path | None, key: str) -> dict | None:
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if key in content:
            return content
    except (OSError, ValueError) as error:
        raise FactorLLMError(f"{path} cannot be read: {one_line(error)}") from None
    raise FactorLLMError(f"{path} is not what factorllm eval -o or bench -o writes: it has no {key}")
