"""FactorLLM: turn a dense LLM into a faster sparse Mixture of Experts that every engine already loads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from factorllm.errors import FactorLLMError

if TYPE_CHECKING:
    from factorllm.convert.factorize import factorize
    from factorllm.exporting.gguf_file import export_gguf as export
    from factorllm.healing.run import heal
    from factorllm.healing.settings import HealSettings
    from factorllm.making.plan_file import MakePlan
    from factorllm.making.run import make, make_planned
    from factorllm.measure.front.plan import FrontPlan
    from factorllm.measure.front.run import run_front as front
    from factorllm.measure.scores import evaluate
    from factorllm.measure.settings import EvalSettings
    from factorllm.measure.speed.plan import Plan
    from factorllm.measure.speed.run import run_bench as bench
    from factorllm.planning.outlook import plan
    from factorllm.planning.wish import Wish
    from factorllm.recipe import Recipe, Shape, parse_recipe
    from factorllm.runs.settings import Settings
    from factorllm.serving.serve import serve
    from factorllm.serving.settings import ServeSettings
    from factorllm.text.sample import sample
    from factorllm.trimming.trim import trim

_PUBLIC = {
    "EvalSettings": ("measure.settings", "EvalSettings"),
    "FrontPlan": ("measure.front.plan", "FrontPlan"),
    "HealSettings": ("healing.settings", "HealSettings"),
    "MakePlan": ("making.plan_file", "MakePlan"),
    "Plan": ("measure.speed.plan", "Plan"),
    "Recipe": ("recipe", "Recipe"),
    "ServeSettings": ("serving.settings", "ServeSettings"),
    "Settings": ("runs.settings", "Settings"),
    "Shape": ("recipe", "Shape"),
    "Wish": ("planning.wish", "Wish"),
    "bench": ("measure.speed.run", "run_bench"),
    "evaluate": ("measure.scores", "evaluate"),
    "export": ("exporting.gguf_file", "export_gguf"),
    "factorize": ("convert.factorize", "factorize"),
    "front": ("measure.front.run", "run_front"),
    "heal": ("healing.run", "heal"),
    "make": ("making.run", "make"),
    "make_planned": ("making.run", "make_planned"),
    "parse_recipe": ("recipe", "parse_recipe"),
    "plan": ("planning.outlook", "plan"),
    "sample": ("text.sample", "sample"),
    "serve": ("serving.serve", "serve"),
    "trim": ("trimming.trim", "trim"),
}
"""Module and name there of each public name. torch and transformers, which take seconds to import, are loaded when one
is asked for."""

__all__ = [
    "EvalSettings",
    "FactorLLMError",
    "FrontPlan",
    "HealSettings",
    "MakePlan",
    "Plan",
    "Recipe",
    "ServeSettings",
    "Settings",
    "Shape",
    "Wish",
    "bench",
    "evaluate",
    "export",
    "factorize",
    "front",
    "heal",
    "make",
    "make_planned",
    "parse_recipe",
    "plan",
    "sample",
    "serve",
    "trim",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _PUBLIC[name]
    return getattr(import_module(f"factorllm.{module}"), inner)
