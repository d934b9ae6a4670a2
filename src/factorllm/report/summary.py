"""The measured result of a conversion, and its tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.measure.cost import Cost
from factorllm.recipe import Recipe
from factorllm.runs.output import read_json


@dataclass(frozen=True)
class ModelRow:
    """One model's line: `dense`, `student` or `pruned` (the static prune with the same active parameters)."""

    name: str
    perplexity: float
    cost: Cost

    def as_dict(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, **asdict(self.cost)}


@dataclass(frozen=True)
class Spent:
    """What a run took.

    Attributes:
        conversion_seconds: wall time of all layers, without the baseline and without the measuring.
        baseline_seconds: wall time of the static prune's layers.
        peak_memory_bytes: largest resident memory of the process, the measuring included.
    """

    conversion_seconds: float
    baseline_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Summary:
    """What was made, from what, and what was measured.

    Attributes:
        base_model: name of the dense model, fit to publish.
        logit_scale: factor on the student's logits (`temperature.fit_logit_scale`), 1 when nothing was restored.
        layers: for each layer that has an FFN, its number and the student's statistics (see `convert.convert_layer`).
        images: where images were looked at, their folder's name, and images and tokens of each part and kind.
        spent: what the run took, once it has ended.
        done_already: whether it was made before, by a call with the same arguments.
    """

    base_model: str
    out: Path
    recipe: Recipe
    host: str
    engines: tuple[str, ...]
    text_origin: str
    calibration_tokens: int
    held_out_tokens: int
    rows: list[ModelRow]
    logit_scale: float
    layers: list[dict[str, Any]]
    images: dict[str, Any] | None = None
    spent: Spent | None = None
    done_already: bool = False

    def row(self, name: str) -> ModelRow:
        return next(row for row in self.rows if row.name == name)

    def ratio(self, name: str) -> float:
        """Perplexity of a model divided by the dense model's."""
        return self.row(name).perplexity / self.row("dense").perplexity


RUN_FILE = "factorllm.run.json"
"""The file of a checkpoint that says what its making took."""


def read_summary(out: Path, made: dict[str, Any]) -> Summary:
    """The summary of a checkpoint that `factorize` made before.

    Args:
        made: the content of its `factorllm.json`.
    """
    spent = read_json(out / RUN_FILE) or {}
    rows = [
        ModelRow(name, row["perplexity"], Cost(**{key: value for key, value in row.items() if key != "perplexity"}))
        for name, row in made["results"].items()
    ]
    return Summary(
        base_model=made["base_model"]["name"],
        out=out,
        recipe=Recipe(**made["recipe"]),
        host=made["host"],
        engines=tuple(made["engines"]),
        text_origin=made["data"]["origin"],
        calibration_tokens=made["data"]["calibration_tokens"],
        held_out_tokens=made["data"]["held_out_tokens"],
        rows=rows,
        logit_scale=made["logit_scale"],
        layers=made["layers"],
        images=made["data"].get("images"),
        spent=Spent(**{field.name: spent.get(field.name, 0) for field in fields(Spent)}),
        done_already=True,
    )


LABELS = {"dense": "dense", "student": "student", "healed": "healed", "pruned": "static prune"}


def measured_on(made: dict[str, Any]) -> tuple[int, str]:
    """The number of held-out tokens that the results of a checkpoint are of, and their text: that of its last healing,
    if it was healed.

    Args:
        made: the content of its `factorllm.json`.
    """
    data, healing = made["data"], made.get("healing")
    if healing:
        return healing.get("held_out_tokens", data["held_out_tokens"]), healing["text"]
    text = f"one kind of text in {data['origin']}" if "kinds_of" in data else data["origin"]
    return data["held_out_tokens"], text


def result_table(results: dict[str, dict[str, Any]], title: str) -> Table:
    """Dense, student and static prune side by side.

    Args:
        results: for each model, `ModelRow.as_dict()`.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    columns = (
        "model",
        "perplexity",
        "x dense",
        "FFN\nsparsity",
        "active\nparameters",
        "total\nparameters",
        "MFLOPs\nper token",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    dense = results["dense"]["perplexity"]
    for name, row in results.items():
        table.add_row(
            LABELS[name],
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / dense:.2f}",
            f"{row['ffn_sparsity']:.0%}",
            f"{row['active_parameters'] / 1e6:.1f} M",
            f"{row['total_parameters'] / 1e6:.1f} M",
            f"{row['flops_per_token'] / 1e6:.0f}",
        )
    return table


def layer_numbers(layers: list[dict[str, Any]]) -> list[int]:
    """Which layers the statistics are of. Where it is not said, as in older checkpoints, it is all of them."""
    return [layer.get("layer", index) for index, layer in enumerate(layers)]


def layer_table(layers: list[dict[str, Any]]) -> Table:
    """Per layer: router agreement with the prior, evenness of expert load, stream error, ridge strength."""
    table = Table(title="layers", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("layer", "router\nagrees", "expert load\nmin - max", "stream\nerror", "ridge\nstrength"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, layer in zip(layer_numbers(layers), layers, strict=True):
        load = layer["expert_load"]
        table.add_row(
            str(number),
            "-" if layer["router_agreement"] is None else f"{layer['router_agreement']:.0%}",
            f"{min(load):.0%} - {max(load):.0%}" if load else "-",
            f"{layer['stream_error']:.3f}",
            "-" if layer["ridge_strength"] is None else f"{layer['ridge_strength']:g}",
        )
    return table


@dataclass(frozen=True)
class KindRow:
    """What is known of the tokens of images, or of text.

    Attributes:
        calibration_tokens, held_out_tokens: how many there were.
        ffn_error: the squared error of the FFNs' output on those that were held out, relative to the dense FFN's on the
            same inputs, mean over tokens and layers.
    """

    kind: str
    calibration_tokens: int
    held_out_tokens: int
    ffn_error: float


def kind_rows(images: dict[str, Any], layers: list[dict[str, Any]]) -> list[KindRow]:
    """A row for the tokens of text, and one for those of images.

    Args:
        images: `images` of a `Summary`.
    """
    return [
        KindRow(
            kind,
            images[f"calibration_{kind}_tokens"],
            images[f"held_out_{kind}_tokens"],
            mean(layer["ffn_error"][kind] for layer in layers),
        )
        for kind in ("text", "image")
    ]


def kind_table(images: dict[str, Any], layers: list[dict[str, Any]]) -> Table:
    """Tokens of text and of images, and the error of the student's FFNs on each."""
    title = f"{images['calibration_images']:,} images of {images['origin']}, {images['held_out_images']:,} held out"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in ("tokens of", "calibration", "held out", "FFN error\n(held out)"):
        table.add_column(column, justify="left" if column == "tokens of" else "right", no_wrap=True)
    for row in kind_rows(images, layers):
        table.add_row(row.kind, f"{row.calibration_tokens:,}", f"{row.held_out_tokens:,}", f"{row.ffn_error:.3f}")
    return table


def mean_agreement(layers: list[dict[str, Any]]) -> float | None:
    """How often the routers' picks agree with the prior's, mean over layers."""
    values = [layer["router_agreement"] for layer in layers if layer["router_agreement"] is not None]
    return mean(values) if values else None
