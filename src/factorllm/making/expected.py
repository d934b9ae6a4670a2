"""How long each step of a plan is expected to take: roughly, for `runs.course` learns from those that have ended."""

from __future__ import annotations

from factorllm.dense.headers import read_dense_config
from factorllm.making.plan_file import MakePlan
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.speed.plan import Plan
from factorllm.planning.pace import Pace
from factorllm.planning.stand_in import with_tokens
from factorllm.recipe import parse_recipe

_AT_LEAST = 5.0
"""Seconds of any step: models are opened and files written."""
_COUNTED = 60.0
"""Seconds of cutting 10 million tokens."""
_SAMPLED, _DECODED = 2, 10
"""Passes that are as long as saying a token, in large batches and alone: each reads all weights."""
_QUESTIONS = 100_000
"""Tokens of a task whose number of questions is not limited."""
_QUESTION = 100
_REPORT = 6_000
"""Tokens that the models read for the report; few are said."""


def expected_seconds(plan: MakePlan, steps: list[str]) -> dict[str, float]:
    """Of the named steps.

    Raises:
        FactorLLMError: for a model that cannot be read.
    """
    config, pace, recipe = read_dense_config(plan.model), Pace.measure(), parse_recipe(plan.recipe)
    if plan.vocabulary:
        config = with_tokens(config, plan.vocabulary)
    settings, heal = plan.factorize, plan.heal
    students = 2 if settings.baseline and not recipe.is_prune else 1
    found = {
        "factorize": pace.convert_seconds(config, students * settings.tokens * (1 + settings.tune)),
        "trim": _COUNTED,
        "heal": pace.heal_seconds(config, recipe, heal.tokens * heal.epochs) if heal else 0,
    }
    passes = _passes(plan, students)
    return {step: _AT_LEAST + found.get(step, 0) + pace.forward_seconds(config, passes.get(step, 0)) for step in steps}


def _passes(plan: MakePlan, students: int) -> dict[str, int]:
    """Tokens that the dense model could read in the time that a step takes beside converting and healing."""
    held_out = plan.factorize.held_out_tokens
    heal = plan.heal.validation_tokens * (plan.heal.evaluations + 1) if plan.heal else 0
    questions = _QUESTION * plan.evaluate.limit if plan.evaluate.limit else _QUESTIONS
    return {
        "sample": _SAMPLED * plan.sample.tokens if plan.sample else 0,
        "factorize": (1 + students) * held_out,
        "heal": heal + 3 * held_out,
        "export": 65_536 if plan.export.weighed or plan.export.gptq else 0,
        "eval": 4 * held_out + 2 * questions * len(plan.evaluate.tasks),
        "bench": _timed(plan.bench, 2) if plan.bench else 0,
        "front": _fronted(plan.front) if plan.front else 0,
        "report": _REPORT,
    }


def _timed(plan: Plan, models: int) -> int:
    decoded = len(plan.batches) * (plan.context + _DECODED * plan.steps)
    return models * plan.rounds * (sum(plan.prompts) + decoded)


def _fronted(front: FrontPlan) -> int:
    files = 2 * len(front.types)
    weighed = 2 * front.importance_tokens
    return weighed + _timed(front.speed_plan(), files) + files * _DECODED * front.perplexity_tokens
