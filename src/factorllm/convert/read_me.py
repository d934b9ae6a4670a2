"""The end of a conversion for kinds of text (Read-ME, arXiv 2410.19123): a prune for each kind, and what says before
any layer runs which of them a prompt is for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorllm.convert.finish import complete, load_written, provenance, summary_of, write_spent
from factorllm.convert.job import Job, Student
from factorllm.measure.cost import Cost, cost_of, dense_shape
from factorllm.measure.perplexity import perplexity
from factorllm.recipe import ReadMe
from factorllm.report import ModelRow, Summary, read_summary
from factorllm.runs.memory import give_back_freed_memory
from factorllm.runs.output import KINDS, PROVENANCE
from factorllm.runs.progress import Meter, meter
from factorllm.runs.workspace import write_json, write_text
from factorllm.text.intuition import Intuition

PROMPT = 128
"""Tokens of a prompt that the choice of a kind is fitted on."""


def finish_kinds(job: Job, logit_scales: dict[str, float], recipe: ReadMe) -> Summary:
    """Fit the choice of a kind, measure, complete the checkpoint of each kind, and publish them together."""
    text, others = job.text, [student for student in job.students if student.kind is None]
    with meter(job.console, "measuring perplexity", (2 + len(others)) * len(text.held_out)) as bar:
        model = job.source.load_model(job.settings.compute_dtype, job.settings.torch_device)
        measured = {"dense": _by_kind(job, lambda kind, model=model: model, bar)}
        del model
        measured["student"] = _by_kind(job, lambda kind: load_written(job, job.kept[kind]), bar)
        for pruned in others:
            model = load_written(job, pruned)
            measured[pruned.name] = _by_kind(job, lambda kind, model=model: model, bar)
            del model
    folder, intuition = job.work.folder_at("student"), _fit_intuition(job)
    summary = _summary(job, recipe, measured, logit_scales)
    for student in job.kept:
        of_kind = _summary(job, recipe, measured, logit_scales, student)
        complete(job, student, of_kind, f"{job.work.out.name}/{student.kind}")
    intuition.save(folder)
    found = {
        "kinds": [
            {
                "calibration_tokens": int((text.kinds == kind).sum()) * text.calibration.shape[1],
                "perplexity": {name: of_kinds[kind] for name, of_kinds in measured.items()},
            }
            for kind in range(recipe.kinds)
        ],
        "chosen_as_found": _chosen_as_found(job, intuition),
    }
    write_json(folder / PROVENANCE, provenance(job, summary) | found)
    write_text(folder / "README.md", _card(job.work.out.name, summary, recipe))
    spent = write_spent(job, folder)
    job.work.publish(folder)
    return replace(summary, recipe=recipe, spent=spent)


def read_kinds_summary(out: Path, recipe: ReadMe) -> Summary:
    """The summary of what `finish_kinds` published before."""
    made = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    return replace(read_summary(out, made), recipe=recipe)


def _fit_intuition(job: Job) -> Intuition:
    """Fitted to pieces of the calibration text, whose kinds are known.

    Read-ME's own labels, of each prompt the share of the dense model's energy that each kind's neurons hold, choose
    worse (docs/experiments/2026-11.md).
    """
    tokens, window = job.text.calibration, min(PROMPT, job.text.calibration.shape[1])
    pieces = tokens.shape[1] // window
    prompts = tokens[:, : pieces * window].reshape(-1, window)
    return Intuition.from_labels(_decoded(job, prompts), job.text.kinds.repeat_interleave(pieces).tolist())


def _decoded(job: Job, prompts: Tensor) -> list[str]:
    tokenizer = job.source.tokenizer()
    return [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts.tolist()]


def _by_kind(job: Job, model_of: Callable[[int], PreTrainedModel], bar: Meter) -> list[float]:
    """The perplexity on what was held out of each kind."""
    found = []
    for kind in range(len(job.kept)):
        give_back_freed_memory()
        found.append(perplexity(model_of(kind), job.text.held_out[job.text.held_out_kinds == kind], bar.advance))
    return found


def _summary(
    job: Job, recipe: ReadMe, measured: dict[str, list[float]], scales: dict[str, float], student: Student | None = None
) -> Summary:
    """Of one student on its own kind of text, or of all of them, each on its own."""
    config, own = job.source.config, job.kept[0] if student is None else student
    counts = torch.bincount(job.text.held_out_kinds, minlength=recipe.kinds).double()
    if student is not None:
        counts *= torch.arange(recipe.kinds) == student.kind
    rows = []
    for name, of_kinds in measured.items():
        cost = cost_of(config, dense_shape(config)) if name == "dense" else own.cost(config)
        if name == "student" and student is None:
            cost = replace(cost, total_parameters=recipe.kinds * cost.total_parameters)
        rows.append(_row(name, of_kinds, counts, cost))
    return summary_of(job, own, rows, scales, int(counts.sum()) * job.text.held_out.shape[1])


def _row(name: str, of_kinds: list[float], counts: Tensor, cost: Cost) -> ModelRow:
    losses = torch.tensor(of_kinds, dtype=torch.float64).log()
    return ModelRow(name, math.exp((losses[counts > 0] * counts[counts > 0]).sum() / counts.sum()), cost)


def _chosen_as_found(job: Job, intuition: Intuition) -> float:
    """How often the kind that is chosen for a held-out prompt is the one that its document was found to be of."""
    prompts = _decoded(job, job.text.held_out[:, :PROMPT])
    chosen = torch.tensor([int(intuition.probabilities(prompt).argmax()) for prompt in prompts])
    return (chosen == job.text.held_out_kinds).double().mean().item()


def _card(name: str, summary: Summary, recipe: ReadMe) -> str:
    lines = [
        f"# {name}",
        "",
        f"{summary.base_model}, factorised by FactorLLM as `{recipe.name}` from {summary.text_origin}: in `{KINDS}/` "
        f"{recipe.kinds} narrower models, each for one kind of text, each a checkpoint of its own "
        f"(loads in {', '.join(summary.engines)}). Which of them a request is for, `intuition.json` says.",
        "",
        f"`factorllm serve {quote(name)}` serves them at one address.",
        "",
        f"Perplexity on {summary.held_out_tokens:,} held-out tokens, each kind by its own model:",
        "",
        *(f"- {row.name}: {row.perplexity:.2f}" for row in summary.rows),
    ]
    return "\n".join(lines) + "\n"
