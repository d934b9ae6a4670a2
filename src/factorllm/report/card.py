"""The model card: README.md of the output."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from factorllm.recipe import Recipe
from factorllm.report.summary import LABELS, mean_agreement


def model_card(name: str, made: dict, licence: str | None) -> str:
    """The model card as Markdown: base model, licence, recipe, and the numbers that were measured.

    Args:
        made: the content of `factorllm.json`.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("factorllm.report").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        made=made,
        recipe=Recipe(**made["recipe"]),
        healing=made.get("healing"),
        licence=licence,
        labels=LABELS,
        agreement=mean_agreement(made["layers"]),
    )
