"""The table of an evaluation."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.measure.chain.run import ChainScore
from factorllm.measure.scores import Evaluation
from factorllm.measure.tasks import TASKS, Score, kept_in_mean, retention
from factorllm.runs.output import Kind, read_json


def _read_scores(path: Path) -> dict | None:
    content = read_json(path) or {}
    return content if {"scores", "perplexity", "agreement"} <= content.keys() else None


SCORES = Kind("what factorllm eval wrote", False, _read_scores)


def score_table(found: Evaluation) -> Table:
    """A row a task: dense, student, and retention, plain and above chance; then all tasks, and the text."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("task", "metric", "asked", "dense", "student", "retained", "above\nchance"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    student, dense = found.scores["student"], found.scores.get("dense", {})
    for task, score in student.items():
        kept = map(_percent, retention({task: score}, dense))
        table.add_row(task, TASKS[task].metric, str(score.questions), _shown(dense.get(task)), _shown(score), *kept)
    if len(student) > 1:
        mean = kept_in_mean(student, dense)
        means = [_mean([scores[task] for task in mean.tasks if scores]) for scores in (dense, student)]
        table.add_row("mean", "", "", *map(_percent, (*means, mean.plain, mean.above)), end_section=True)
        if mean.guessed:
            table.caption, table.caption_justify = left_out(mean.guessed), "left"
    if found.perplexity:
        values = [f"{found.perplexity[name]:.2f}" if name in found.perplexity else "-" for name in ("dense", "student")]
        table.add_row("text", "perplexity", "", *values, "", "")
    if found.agreement:
        if found.agreement.kl is not None:
            table.add_row("text", "KL to dense", "", "0", f"{found.agreement.kl:.3f}", "", "")
        table.add_row("text", "top-1 agreement", "", "100%", f"{found.agreement.top_1:.1%}", "", "")
    return table


def chain_table(found: ChainScore) -> Table:
    """A row a step: how often the student answers as the dense model does; then what both find."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=f"chain {found.chain}")
    for column in (f"{found.documents} documents", "asked", "as dense, given\nits answers", "by its own", "compounded"):
        table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
    for step in found.steps:
        lost = f"{step.given - step.own:.1%}"
        table.add_row(step.name, str(step.asked), f"{step.given:.1%}", f"{step.own:.1%}", lost)
    if found.found is not None:
        table.add_row("found, F1 to dense", "", "", f"{found.found:.1%}", "", end_section=True)
    for name, value in sorted(found.f1.items()):
        table.add_row(f"found, F1 of the {name}", "", "", f"{value:.1%}", "")
    return table


def _shown(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.1%}" + ("" if score.error is None else f" ± {score.error:.1%}")


def left_out(guessed: list[str]) -> str:
    """Why tasks are not in the mean."""
    return f"not in the mean, the dense model being at most two standard errors above chance: {', '.join(guessed)}"


def _mean(scores: list[Score]) -> float | None:
    return sum(score.value for score in scores) / len(scores) if scores else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
