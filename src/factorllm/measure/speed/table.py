"""Tables, JSON and plots of measured speeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.measure.cost import Cost
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.timing import Measure


def dense_of(measures: list[Measure]) -> Measure:
    return next(measure for measure in measures if measure.subject.name == "dense")


def speed_table(measures: list[Measure], plan: Plan, title: str) -> Table:
    """Tokens/s and ratios to the dense model and to the last prune (quartiles in brackets), and what they cost."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("", *(measure.subject.name for measure in measures)):
        table.add_column(column, justify="left" if not column else "right")
    dense, last = dense_of(measures), measures[-1]
    for what in plan.names():
        table.add_row(f"{what}, tokens/s", *(f"{measure.speed(what):.1f}" for measure in measures))
        table.add_row("  x dense", *(_ratio(measure, dense, what) for measure in measures))
        if last is not dense:
            table.add_row(f"  x {last.subject.name}", *(_ratio(measure, last, what) for measure in measures))
    table.add_row("ideal x dense", *(f"{measure.subject.ideal_over(dense.subject):.2f}" for measure in measures))
    first = f"first token after {min(plan.prompts)}, ms"
    table.add_row(first, *(f"{1000 * median(measure.first_token(min(plan.prompts))):.0f}" for measure in measures))
    threads = (f"{measure.threads['prefill']} / {measure.threads['decode']}" for measure in measures)
    table.add_row("threads, prefill / decode", *threads)
    table.add_row("peak memory, MiB", *(f"{measure.peak_memory / 2**20:.0f}" for measure in measures))
    table.add_row("on disk, MiB", *(f"{measure.subject.size / 2**20:.0f}" for measure in measures))
    return table


def _ratio(measure: Measure, dense: Measure, what: str) -> str:
    middle, low, high = measure.ratio(dense, what)
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def as_json(measures: list[Measure], plan: Plan, engine: str) -> dict:
    """Everything that was measured, for `speed.json`."""
    dense = dense_of(measures)
    return {
        "engine": engine,
        "plan": plan.model_dump(),
        "models": [
            {
                "name": measure.subject.name,
                "path": measure.subject.model,
                "bytes": measure.subject.size,
                "peak_memory_bytes": measure.peak_memory,
                "threads": measure.threads,
                "cost": _cost(measure.subject.cost),
                "ideal_ratio": measure.subject.ideal_over(dense.subject),
                "tokens_per_second": measure.speeds,
                "first_token_seconds": measure.first_token(min(plan.prompts)),
                "ratio_to_dense": {what: measure.ratio(dense, what) for what in plan.names()},
            }
            for measure in measures
        ],
    }


def _cost(cost: Cost) -> dict[str, int]:
    """All but the FFN sparsity: how wide the dense FFN was, the config of a prune does not say, nor one of experts that
    overlap."""
    return {key: value for key, value in asdict(cost).items() if key != "ffn_sparsity"}


def write_plot(measures: list[Measure], plan: Plan, title: str, path: Path) -> None:
    """Bars of the ratios to the dense model with their quartiles, and the ideal as a dash."""
    from matplotlib.figure import Figure  # not pyplot, whose way of showing figures is the caller's

    dense, what = dense_of(measures), list(plan.names())
    others = [measure for measure in measures if measure is not dense]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    width = 0.8 / len(others)
    for index, measure in enumerate(others):
        places = [place + index * width for place in range(len(what))]
        ratios = [measure.ratio(dense, name) for name in what]
        middles = [ratio[0] for ratio in ratios]
        spread = [[r[0] - r[1] for r in ratios], [r[2] - r[0] for r in ratios]]
        bars = axes.bar(places, middles, width, yerr=spread, capsize=3, label=measure.subject.name)
        axes.bar_label(bars, fmt="%.2f", padding=4)
        ideal = measure.subject.ideal_over(dense.subject)
        left, right = ([place + side * width / 2 for place in places] for side in (-1, 1))
        axes.hlines([ideal] * len(places), left, right, label="ideal" if index == 0 else None)
    axes.axhline(1, linestyle=":", color="grey")
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(what))], what)
    axes.set_ylabel("x dense")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
