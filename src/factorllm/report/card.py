"""The model card: README.md of the output."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from factorllm.report.summary import LABELS, Summary, mean_agreement


def model_card(summary: Summary, licence: str | None) -> str:
    """The model card as Markdown: base model, licence, recipe, and the numbers that were measured."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("factorllm.report").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        summary=summary,
        base=summary.base_model,
        licence=licence,
        labels=LABELS,
        agreement=mean_agreement(summary.layers),
    )
