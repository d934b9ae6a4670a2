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

from factorllm.dense import open_model
from factorllm.dense.generate import complete
from factorllm.dense.opening import opened
from factorllm.dense.safetensors import read_tokenizer
from factorllm.errors import FactorLLMError
from factorllm.measure.routing import Specialisation, expert_picks_for, specialisation
from factorllm.report.measured import Measured
from factorllm.runs.device import usable_device
from factorllm.runs.progress import meter
from factorllm.student.read import load_student, read_provenance
from factorllm.student.routers import Routers

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
        measured: what other commands measured, as far as their files were given.
    """

    made: dict
    specialisation: Specialisation | None
    samples: list[Sample]
    measured: Measured


def gather(checkpoint: Path, against: str | None, measured: Measured, device: str, console: Console) -> Findings:
    """Read what is known of a checkpoint, run it on texts of several kinds, and let it write.

    Args:
        against: the dense model, for its continuations beside the student's.

    Raises:
        FactorLLMError: for a checkpoint or file that cannot be read.
    """
    made = read_provenance(checkpoint)
    device = usable_device(device)
    tokenizer, student = read_tokenizer(checkpoint, str(checkpoint)), load_student(checkpoint, device=device)
    kinds = _kinds(tokenizer)
    models = [student]
    if against:
        models.append(_dense(against, student, tokenizer, device))
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
    return Findings(made, special, samples, measured)


def _continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return complete(model, tokenizer, prompt).removeprefix(prompt).strip()


def _kinds(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Tokens of a text of each kind, all of the same number: (n,)."""
    texts = json.loads(files("factorllm.report").joinpath("kinds.json").read_text(encoding="utf-8"))
    tokens = {kind: torch.tensor(opened(tokenizer, text)) for kind, text in texts.items()}
    shortest = min(map(len, tokens.values()))
    return {kind: row[:shortest] for kind, row in tokens.items()}


def _dense(against: str, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str) -> PreTrainedModel:
    source = open_model(against)
    own, its = student.config.vocab_size, source.config.vocab_size
    if own != its or source.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise FactorLLMError(
            f"{against} knows {its} tokens and the student {own if own != its else 'others'}, so it is not the "
            "model that the student was made from; give that one with --against"
        )
    return source.load_model(torch.float32, torch.device(device))
