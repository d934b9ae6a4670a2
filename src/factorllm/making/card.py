"""What is said of a made model: three numbers, its card, and how to use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factorllm.dense.safetensors import licence_of_card
from factorllm.errors import refusing
from factorllm.making.plan_file import MakePlan
from factorllm.measure.tasks import Score, in_mean, retention
from factorllm.report.card import model_card
from factorllm.runs.output import read_json
from factorllm.runs.workspace import write_text
from factorllm.student.read import read_provenance

if TYPE_CHECKING:
    from factorllm.making.steps import Place


@dataclass(frozen=True)
class Numbers:
    """What was gained and what was kept.

    Attributes:
        speed: decoding at batch 1, over the dense model's file of the same type: median and quartiles over the turns;
            None where it was not timed.
        kept: share of the dense model's scores; of its most likely next tokens where no tasks were asked.
        kept_of: which of both.
        perplexity: over the dense model's, on held-out text.
        size: bytes of the GGUF file.
    """

    speed: tuple[float, float, float] | None
    kept: float
    kept_of: str
    perplexity: float
    size: int

    def lines(self) -> list[str]:
        """One line each, the three that count first."""
        speed = "not timed"
        if self.speed is not None:
            middle, low, high = self.speed
            speed = f"decodes {middle:.2f} x as fast as dense [{low:.2f}-{high:.2f}]"
        return [
            f"speed  {speed}",
            f"kept   {self.kept:.0%} of {self.kept_of}, perplexity x {self.perplexity:.2f}",
            f"size   {self.size / 2**20:.0f} MiB",
        ]


def read_numbers(at: Place) -> Numbers:
    """The numbers of a finished model, from the files that its steps wrote."""
    with refusing(at.out, "make it again: factorllm make"):
        measured = read_json(at.scores) or {}
        kept, of = _kept(measured)
        timed = read_json(at.speed / "speed.json")
        models = {model["name"]: model for model in timed["models"]} if timed else {}
        speed = tuple(models["student"]["ratio_to_dense"]["decode x1"]) if models else None
        perplexity = measured["perplexity"]["student"] / measured["perplexity"]["dense"]
        return Numbers(speed, kept, of, perplexity, at.gguf.stat().st_size)


def _kept(measured: dict) -> tuple[float, str]:
    scores = {
        name: {task: Score(**score) for task, score in tasks.items()} for name, tasks in measured["scores"].items()
    }
    if scores.get("dense"):
        counted, _ = in_mean(scores["student"], scores["dense"])
        plain, _ = retention({task: scores["student"][task] for task in counted}, scores["dense"])
        if plain is not None:
            return plain, f"the scores of {', '.join(counted)}"
    return measured["agreement"]["top_1"], "the likeliest next tokens"


def write_card(plan: MakePlan, at: Place) -> Path:
    """`README.md` of the folder: the model card of its checkpoint, with the three numbers and how to use it."""
    made = read_provenance(at.checkpoint)
    card = model_card(at.out.name, made, licence_of_card(at.checkpoint / "README.md"))
    numbers = "\n".join(f"- {line}" for line in read_numbers(at).lines())
    used = "\n".join(commands(plan, at))
    path = at.out / "README.md"
    write_text(path, f"{card}\n## In short\n\n{numbers}\n\n## Use it\n\n```sh\n{used}\n```\n")
    return path


def commands(plan: MakePlan, at: Place) -> list[str]:
    """How to chat, serve and evaluate."""
    return [
        f"factorllm chat {at.out}",
        f"factorllm serve {at.gguf}",
        f"factorllm eval {at.checkpoint} --against {plan.model}",
        f"ollama create {at.out.name.lower()} -f {at.out / 'Modelfile'}",
    ]
