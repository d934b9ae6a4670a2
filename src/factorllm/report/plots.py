"""The report's figures, each as PNG and as SVG that takes the colours of the page.

They are made without pyplot, which would show them in a notebook, or take its way of showing figures from it.
"""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from factorllm.measure.front.points import Point
from factorllm.measure.front.show import draw_by_speed
from factorllm.measure.routing import Specialisation
from factorllm.report.summary import LABELS, layer_numbers

_NARROW = (4.2, 3.0)  # inches; its text can still be read on a phone
_STYLE = {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def quality_figure(results: dict[str, dict], speed: dict[str, float] | None) -> Figure:
    """Perplexity against speed, a point a model.

    Args:
        results: for each model, `ModelRow.as_dict()`.
        speed: decode speed of models in one engine, x dense; None draws FLOPs by formula instead.
    """
    figure, axes = _figure()
    dense = results["dense"]
    for name, row in results.items():
        if speed and name not in speed:
            continue
        ratio = speed[name] if speed else dense["flops_per_token"] / row["flops_per_token"]
        loss = row["perplexity"] / dense["perplexity"]
        axes.plot(ratio, loss, marker="o", markersize=9, linestyle="")
        axes.annotate(LABELS[name], (ratio, loss), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("measured decode speed, x dense" if speed else "dense FLOPs per token / its own")
    axes.set_ylabel("perplexity, x dense")
    axes.margins(0.25)
    return figure


def front_figure(points: list[Point]) -> Figure:
    """Perplexity of each file against its decode speed, with the hull of what quantisation alone gives."""
    figure, axes = _figure()
    draw_by_speed(axes, points)
    return figure


def routing_figure(layers: list[dict]) -> Figure:
    """Router agreement and energy kept in each layer that has an FFN."""
    figure, axes = _figure()
    for key, label in (("router_agreement", "picks as the prior's"), ("energy_kept", "energy kept")):
        values = [layer.get(key) for layer in layers]
        if None not in values:
            axes.plot(layer_numbers(layers), [100 * value for value in values], marker=".", label=label)
    axes.set_ylim(0, 100)
    axes.set_xlabel("layer")
    axes.set_ylabel("%")
    axes.legend(loc="lower right", frameon=False)
    return figure


def error_figure(layers: list[dict]) -> Figure:
    """Relative squared error of the stream after each layer that has an FFN."""
    figure, axes = _figure()
    axes.plot(layer_numbers(layers), [layer["stream_error"] for layer in layers], marker=".")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("squared error / squared norm")
    return figure


def load_figure(layers: list[dict]) -> Figure:
    """Share of tokens that run each expert."""
    figure, axes = _figure()
    grid = [[100 * share for share in layer["expert_load"]] for layer in layers]
    shown = axes.pcolormesh(list(zip(*grid, strict=True)), vmin=0, cmap="viridis")
    _expert_axes(axes, len(grid[0]))
    figure.colorbar(shown, label="% of tokens")
    return figure


def kinds_figure(found: Specialisation) -> Figure:
    """For each kind of text, how much more or less each expert runs than over all kinds."""
    kinds = list(found.loads)
    average = sum(found.loads.values()) / len(kinds)
    rows = -(-len(kinds) // 2)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 1.5 * rows + 0.6))
        axes = figure.subplots(rows, 2, sharex=True, sharey=True)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        change = 100 * (found.loads[kind] - average).T
        shown = axis.pcolormesh(change.numpy(), vmin=-30, vmax=30, cmap="RdBu_r")
        axis.set_title(kind, fontsize=10)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    _expert_axes(axes[-1][0], average.shape[1])
    figure.tight_layout()
    figure.colorbar(shown, ax=axes, label="% of tokens, more or less than over all kinds", orientation="horizontal")
    return figure


def healing_figure(curve: list[dict], temperature: float) -> Figure:
    """KL to the teacher, both at a temperature, on validation tokens while healing."""
    figure, axes = _figure()
    points = [(point["step"], point["eval_loss"]) for point in curve if "eval_loss" in point]
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set_xlabel("step")
    at = "" if temperature == 1 else f" at temperature {temperature}"
    axes.set_ylabel(f"KL to the dense model{at}, nats")
    return figure


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    return buffer.getvalue()


def as_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element of a page: in the page's own colours, and named for a screen reader."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    head, _, body = svg[svg.index("<svg") :].replace("#000000", "currentColor").partition(">")
    # The page sets the size, and several figures share one page, so their ids must differ.
    head = re.sub(r' (width|height)="[^"]*"', "", head).replace("<svg", f'<svg role="img" aria-label="{description}"')
    return f"{head}>" + re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", body)


def _figure() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_NARROW)
        return figure, figure.subplots()


def _expert_axes(axes: Axes, experts: int) -> None:
    axes.set_yticks([expert + 0.5 for expert in range(experts)], [str(expert) for expert in range(experts)])
    axes.set_xlabel("FFN")
    axes.set_ylabel("expert")
