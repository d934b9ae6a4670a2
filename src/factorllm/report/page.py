"""`factorllm report`: one page that needs no network, and its figures."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from factorllm.measure.tasks import TASKS, kept_in_mean, retention
from factorllm.recipe import Recipe
from factorllm.report.findings import Findings
from factorllm.report.measured import Scores
from factorllm.report.plots import (
    as_png,
    as_svg,
    error_figure,
    front_figure,
    healing_figure,
    kinds_figure,
    load_figure,
    quality_figure,
    routing_figure,
)
from factorllm.report.summary import LABELS, kind_rows, layer_numbers, mean_agreement, measured_on
from factorllm.report.template import read_template
from factorllm.runs.output import check_own_files
from factorllm.runs.workspace import write_text

SPECIALISED = 1.5
"""From this many times the difference within one text on, experts are said to depend on the kind."""

PAGE = "index.html"
FIGURES = ("front", "quality", "routing", "error", "load", "kinds", "healing")
_SIGN = ": FactorLLM report</title>"


def check_report_folder(folder: Path) -> None:
    """Refuse a folder in which the page or a figure would replace a file of the user's.

    Raises:
        FactorLLMError: naming the file, or saying why nothing can be written there.
    """
    check_own_files(folder, (PAGE, *(f"{name}.png" for name in FIGURES)), _is_ours)


def _is_ours(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and _SIGN in page.read_text(encoding="utf-8", errors="replace")


def write_report(name: str, found: Findings, folder: Path) -> Path:
    """Write `index.html` and a PNG of each figure into `folder`.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, pictures = {}, {}
    for figure_name, (figure, description) in _figures(found).items():
        pictures[f"{figure_name}.png"] = as_png(figure)
        drawn[figure_name] = as_svg(figure, figure_name, description)
    made = found.made
    images = made["data"].get("images")
    page = read_template("page.html.jinja").render(
        name=name,
        made=made,
        recipe=Recipe(**made["recipe"]),
        results=made["results"],
        measured_on=measured_on(made),
        labels=LABELS,
        last="healed" if "healed" in made["results"] else "student",
        agreement=mean_agreement(made["layers"]),
        numbered=list(zip(layer_numbers(made["layers"]), made["layers"], strict=True)),
        images=images,
        kinds=kind_rows(images, made["layers"]) if images else [],
        figures=drawn,
        specialisation=found.specialisation,
        specialised=SPECIALISED,
        samples=found.samples,
        tasks=_task_rows(found.measured.scores),
        chain=found.measured.scores and found.measured.scores.chain,
        numbers=found.measured.numbers(),
        front=found.measured.front,
        sort_script=files("factorllm.report").joinpath("sort.js").read_text(encoding="utf-8"),
        measured_speed=found.measured.speed is not None,
    )
    # The page goes first: by it a folder is known as a report's, also one that was left half written.
    write_text(folder / PAGE, page)
    for file_name, picture in pictures.items():
        (folder / file_name).write_bytes(picture)
    return folder / PAGE


def _figures(found: Findings) -> dict[str, tuple[Figure, str]]:
    """Each figure by the name of its file, with what it shows, for those who do not see it."""
    made = found.made
    layers, results = made["layers"], made["results"]
    figures = {}
    if found.measured.front:
        described = "Perplexity of each file against its speed, and the hull of what quantisation alone gives"
        figures["front"] = (front_figure(found.measured.front.points), described)
    speed = found.measured.speed
    figures |= {
        "quality": (
            quality_figure(results, speed.decoding_beside(results) if speed else None),
            "Perplexity of each model against its speed",
        ),
        "routing": (routing_figure(layers), "Router agreement and energy kept for each FFN"),
        "error": (error_figure(layers), "Relative squared error of the residual stream after each FFN"),
    }
    if found.specialisation:
        figures["load"] = (load_figure(layers), "Share of tokens that run each expert, for each FFN")
        figures["kinds"] = (kinds_figure(found.specialisation), "Change of each expert's load with the kind of text")
    if "healing" in made:
        healing = made["healing"]
        figure = healing_figure(healing["curve"], healing["settings"].get("temperature", 1))
        figures["healing"] = (figure, "KL to the dense model while healing")
    return figures


def _task_rows(measured: Scores | None) -> list[dict] | None:
    """A row a task, and all of them: dense, student, retention."""
    if not measured or not measured.scores["student"]:
        return None
    student, dense = measured.scores["student"], measured.scores.get("dense", {})
    rows = []
    for task, score in student.items():
        plain, above = retention({task: score}, dense)
        row = {"task": task, "metric": TASKS[task].metric, "student": score, "dense": dense.get(task)}
        rows.append(row | {"plain": plain, "above": above})
    kept = kept_in_mean(student, dense)
    name = f"all but {', '.join(kept.guessed)}, which the dense model guesses" if kept.guessed else "all"
    mean = {"task": name, "metric": "mean", "student": None, "dense": None}
    return [*rows, mean | {"plain": kept.plain, "above": kept.above}]
