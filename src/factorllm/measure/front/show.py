"""A front as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.errors import refusing
from factorllm.measure.front.points import Front, Point, ahead, decode_time, mean_score, mebibytes, plain_loss
from factorllm.text.calibration import public_name

_COLOURS = {"dense": "tab:grey", "student": "tab:red", "trimmed": "tab:green", "static prune": "tab:blue"}
_STEPS = 200  # of the drawn hull
_SHOWN = "\u200b"  # without width; a legend leaves out what begins with an underscore
_COLUMNS = (
    "model",
    "type",
    "MiB",
    "bits a\nweight",
    "decode\nx dense q8_0",
    "prefill\nx dense q8_0",
    "perplexity",
    "ahead at\nits speed",
    "ahead at\nits size",
)


def front_table(front: Front) -> Table:
    """A row a file: what it takes, how fast it is, what it loses, and whether quantisation alone gives the same.

    *Ahead* is how much higher than its own the perplexity of the dense model's files at the same speed, or size, is;
    where the column is empty, quantisation alone loses less.
    """
    table = Table(title=f"perplexity on {public_name(front.text)}", box=SIMPLE_HEAD, title_justify="left")
    for name in (*_COLUMNS, *_task_columns(front)):
        table.add_column(name, justify="left" if name in ("model", "type") else "right", no_wrap=True)
    for place, point in enumerate(front.points):
        last = place + 1 == len(front.points) or front.points[place + 1].model != point.model
        table.add_row(*front_row(front, point), end_section=last)
    return table


def front_row(front: Front, point: Point) -> list[str]:
    """The cells of a file's row."""
    return [
        point.model,
        point.file_type,
        f"{point.size / 2**20:.0f}",
        f"{point.bits:.2f}",
        _spread(point.timed.decode),
        _spread(point.timed.prefill),
        f"{point.perplexity:.3f}",
        _ahead(point, front, decode_time),
        _ahead(point, front, mebibytes),
        *(f"{score.value:.1%}" for score in point.scores.values()),
        *([_mean(point, front)] if len(point.scores) > 1 else []),
    ]


def front_head(front: Front) -> list[str]:
    """The names of the cells of `front_row`."""
    return [name.replace("\n", " ") for name in (*_COLUMNS, *_task_columns(front))]


def _task_columns(front: Front) -> list[str]:
    tasks = list(front.settings.tasks)
    return [*tasks, *(["mean"] if len(tasks) > 1 else [])]


def _spread(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def _ahead(point: Point, front: Front, cost: Callable[[Point], float]) -> str:
    if point.kind == "dense":
        return ""
    found = ahead(point, front.points, cost)
    if math.isinf(found):
        return "alone"
    return f"{found:.1%}" if found > 0 else ""


def _mean(point: Point, front: Front) -> str:
    found = mean_score(point, _dense(front, point.file_type))
    return "-" if found is None else f"{found:.1%}"


def _dense(front: Front, file_type: str) -> Point:
    return next(point for point in front.points if point.kind == "dense" and point.file_type == file_type)


def front_json(front: Front) -> dict:
    """Everything that was measured, for `front.json`."""
    return {
        "engine": "llamacpp",
        "text": public_name(front.text),
        "plan": front.plan.model_dump(mode="json"),
        "settings": front.settings.model_dump(mode="json", include={"tasks", "limit"}),
        "points": [asdict(point) for point in front.points],
    }


def read_front(path: Path) -> Front:
    """What `front_json` made, from its file.

    Raises:
        FactorLLMError: when it is no such file.
    """
    with refusing(path, "give the front.json that factorllm front wrote"):
        made = json.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(Front).validate_python({key: made[key] for key in ("points", "text", "plan", "settings")})


def write_picture(points: list[Point], path: Path) -> None:
    """Perplexity against decode speed and against size, with the hull of what quantisation alone gives."""
    from matplotlib.figure import Figure  # not pyplot, whose way of showing figures is the caller's

    figure = Figure(figsize=(11, 4.6))
    speed, size = figure.subplots(1, 2, sharey=True)
    draw_by_speed(speed, points)
    _draw(size, points, mebibytes, lambda room: room)
    size.set_xlabel("file, MiB")
    size.invert_xaxis()  # better is to the right in both panels
    size.margins(0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_by_speed(axes, points: list[Point]) -> None:
    """A panel of matplotlib: perplexity against decode speed, with the hull of what quantisation alone gives."""
    _draw(axes, points, decode_time, lambda time: 1 / time)
    axes.set_xlabel("decode speed, x the dense model's q8_0")
    axes.set_ylabel("perplexity")
    for name in axes.legend(frameon=False).get_texts():
        name.set_parse_math(False)  # what is between two dollars would be taken for a formula
    axes.margins(0.12)


def _draw(axes, points: list[Point], cost: Callable[[Point], float], shown: Callable[[float], float]) -> None:
    """One panel: points by model, and the hull of the dense model's.

    Args:
        cost: what the hull is taken over.
        shown: where on the axis a cost lies.
    """
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        label = model if own[0].kind == "dense" else f"{model} ({own[0].kind})"
        label = _SHOWN + label if label.startswith("_") else label
        places = [(shown(cost(point)), point.perplexity) for point in own]
        axes.plot(*zip(*places, strict=True), "o", color=_COLOURS[own[0].kind], label=label)
        for point, place in zip(own, places, strict=True):
            axes.annotate(point.file_type, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    plain = [(cost(point), point.perplexity) for point in points if point.kind == "dense"]
    least, most = min(plain)[0], max(plain)[0]
    steps = [least + (most - least) * step / _STEPS for step in range(_STEPS + 1)]
    hull = [(shown(step), plain_loss(step, plain)) for step in steps]
    axes.plot(*zip(*hull, strict=True), color=_COLOURS["dense"], linewidth=1)
