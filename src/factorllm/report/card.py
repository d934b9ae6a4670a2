"""The model card: README.md of the output."""

from __future__ import annotations

from factorllm.hosts import HOSTS
from factorllm.recipe import Recipe
from factorllm.report.summary import LABELS, mean_agreement
from factorllm.report.template import read_template


def model_card(name: str, made: dict, licence: str | None) -> str:
    """The model card as Markdown: base model, licence, recipe, and the numbers that were measured.

    Args:
        made: the content of `factorllm.json`.
    """
    return read_template("card.md.jinja").render(
        name=name,
        made=made,
        recipe=Recipe(**made["recipe"]),
        healing=made.get("healing"),
        licence=licence,
        labels=LABELS,
        agreement=mean_agreement(made["layers"]),
        ties_in_half=HOSTS[made["host"]].ties_in_half,
    )
