"""What is known of the quality of a shape: what was measured of it, on the model that it was measured on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from factorllm.recipe import Recipe, parse_recipe

_SPELLING = re.compile(r"[^a-z0-9]")


@dataclass(frozen=True)
class Measured:
    """One row of docs/results.md.

    Attributes:
        model: the dense model.
        recipe: the shape.
        perplexity: over the dense model's.
        made: how much it was healed.
        kept: share of the dense model's scores that was kept; None where none were asked.
        of: which scores.
    """

    model: str
    recipe: str
    perplexity: float
    made: str
    kept: float | None = None
    of: str = ""

    def __str__(self) -> str:
        kept = "" if self.kept is None else f", keeps {self.kept:.0%} of {self.of}"
        return f"perplexity x {self.perplexity:.2f}{kept} ({self.model}, {self.recipe}, {self.made})"


def known_quality(recipe: Recipe, model: str) -> Measured | None:
    """What was measured nearest to a shape: of the same model if there is any, else of another; of the same recipe, or
    of one of the same kind that is as sparse.

    Args:
        model: the dense model's name or path.
    """
    like = [row for row in _rows() if _kind(parse_recipe(row.recipe)) == _kind(recipe)]
    asked = _SPELLING.sub("", model.lower())

    def distance(row: Measured) -> tuple[bool, bool]:
        return _SPELLING.sub("", row.model.lower()) not in asked, row.recipe != recipe.name

    return min(like, key=distance, default=None)


def _kind(recipe: Recipe) -> tuple[bool, float]:
    return recipe.is_prune, (recipe.shared + recipe.active) / recipe.parts


@cache
def _rows() -> list[Measured]:
    text = files("factorllm.planning").joinpath("measured.json").read_text(encoding="utf-8")
    return [Measured(**row) for row in json.loads(text)]
