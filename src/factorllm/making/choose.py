"""From a wish to a plan: which shape, how much text, how much healing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console

from factorllm.dense import open_model
from factorllm.dense.headers import read_dense_config, read_dense_header
from factorllm.errors import FactorLLMError
from factorllm.healing.settings import HealSettings
from factorllm.making.check import check_plan, reason_against_timing
from factorllm.making.plan_file import ExportStep, MakePlan, SampleStep
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.speed.plan import Plan
from factorllm.planning.outlook import plan as foretell
from factorllm.planning.pace import Pace
from factorllm.planning.wish import Wish
from factorllm.recipe import Recipe, parse_recipe
from factorllm.runs.progress import minutes
from factorllm.runs.settings import Settings
from factorllm.text.parts import open_text, sequences_of
from factorllm.trimming.choose import check_trim

Effort = Literal["quick", "standard", "best"]

DEFAULT_RECIPE = "S2A2E8"
_MEASURING = 1.25  # of the time of converting and healing, with exporting, measuring and timing
_CUT = 1.1
_LEAST_HEALED = 10_000
"""Tokens; of fewer, finding a rate and measuring would take longer than healing."""


@dataclass(frozen=True)
class _Work:
    """Tokens of each step."""

    calibrated: int
    held_out: int
    healed: int
    tune: int
    rounds: int
    front: tuple[str, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Of the text, with what is lost where documents are cut."""
        validated = HealSettings().validation_tokens if self.healed else 0
        return int(_CUT * (self.calibrated + self.held_out + self.healed + validated))

    def within(self, tokens: int) -> _Work:
        """The same in proportion, from a text of so many tokens."""
        share = min(tokens / self.text_tokens, 1)
        healed = int(share * self.healed)
        return replace(
            self,
            calibrated=max(int(share * self.calibrated), 1),
            held_out=max(int(share * self.held_out), 1),
            healed=healed if healed >= _LEAST_HEALED else 0,
        )


EFFORTS: dict[str, _Work] = {
    "quick": _Work(calibrated=24_576, held_out=8_192, healed=0, tune=0, rounds=3),
    "standard": _Work(calibrated=49_152, held_out=16_384, healed=100_000, tune=0, rounds=5, front=("q8_0", "q4_0")),
    "best": _Work(
        calibrated=240_000, held_out=16_384, healed=500_000, tune=2, rounds=7, front=("q8_0", "q6_k", "q4_0", "iq4_nl")
    ),
}


def choose_plan(
    model: str,
    wish: Wish,
    text: str | None = None,
    vocabulary: int | None = None,
    effort: Effort = "standard",
    file_type: str = "q8_0",
    console: Console | None = None,
) -> MakePlan:
    """The plan of a wish.

    Without a wish for speed, quality or memory the shape is `DEFAULT_RECIPE`, and nothing is timed for it.

    Args:
        text: as for `factorize`; None to sample from the model.
        vocabulary: tokens that stay, by the text; None for all.

    Raises:
        FactorLLMError: when no shape is what is wished for, or the time is too short for any; when the vocabulary is to
            be trimmed without a text, or trimming alone is fast enough; when a step of the plan cannot be done here.
    """
    if effort not in list(EFFORTS):
        raise FactorLLMError(f"no effort {effort!r}; efforts: {', '.join(EFFORTS)}")
    if vocabulary is not None:
        _check_vocabulary(model, vocabulary, text)
    work, recipe = EFFORTS[effort], DEFAULT_RECIPE
    if wish.speed or wish.keep or wish.memory:
        recipe = _shape_of(model, wish, vocabulary, file_type, console)
    if wish.time is not None:
        work = replace(work, healed=_affordable(model, parse_recipe(recipe), work, wish.time))
    if text is not None:
        work = work.within(_tokens_in(text, model, work.text_tokens))
    untimed = reason_against_timing(model)
    if untimed and console:
        console.print(f"nothing will be timed: {untimed}", soft_wrap=True, highlight=False, markup=False)
    context = read_dense_config(model).max_position_embeddings
    timed = Plan(rounds=work.rounds, prompts=(512,), batches=(1,)).within(context)
    plan = MakePlan(
        model=model,
        recipe=recipe,
        text=text,
        vocabulary=vocabulary,
        sample=None if text else SampleStep(tokens=work.text_tokens),
        factorize=Settings(tokens=work.calibrated, held_out_tokens=work.held_out, tune=work.tune),
        heal=HealSettings(tokens=work.healed) if work.healed else None,
        export=ExportStep(type=file_type),
        bench=None if untimed else timed,
        front=_front(work, context) if work.front and not untimed else None,
    )
    check_plan(plan)
    return plan


def _check_vocabulary(model: str, vocabulary: int, text: str | None) -> None:
    if text is None:
        raise FactorLLMError("which tokens stay is counted in a text, the more of it the better; give it with --text")
    check_trim(model, *read_dense_header(model), vocabulary)


def _shape_of(model: str, wish: Wish, vocabulary: int | None, file_type: str, console: Console | None) -> str:
    """The name of the shape that a wish means."""
    outlook = foretell(model, (file_type,), vocabulary, console)
    if console and outlook.advice:
        console.print(outlook.advice)
    expected = outlook.choose(wish, file_type).expected
    if expected.recipe is None:
        raise FactorLLMError(
            f"with {vocabulary:,} tokens alone it is expected to decode {expected.decode_ratio:.2f} times as fast, so "
            "no neuron need be left out; run `factorllm trim` and `factorllm export`, or ask for more --speed"
        )
    return expected.name


def _front(work: _Work, context: int) -> FrontPlan:
    """Of few tokens: what is weighed by them is the same for all files."""
    plan = FrontPlan(types=work.front, importance_tokens=8192, perplexity_tokens=2048, rounds=work.rounds)
    return plan.within(context)


def _tokens_in(text: str, model: str, most: int) -> int:
    """Tokens of a text, repetitions left out, counted up to `most`."""
    source = open_model(model)
    settings = Settings().resolve(source.config)
    return open_text(text, source.tokenizer(), settings).take(sequences_of(most, settings.length)).numel()


def _affordable(model: str, recipe: Recipe, work: _Work, seconds: float) -> int:
    """Tokens to heal on, as many as there is time for beside all else; 0 where healing would be too short to gain.

    Raises:
        FactorLLMError: when there is not time enough to convert.
    """
    config, pace = read_dense_config(model), Pace.measure()
    convert = 2 * pace.convert_seconds(config, work.calibrated * (1 + work.tune))  # the static prune as well
    left = seconds / _MEASURING - convert
    if left < 0:
        raise FactorLLMError(
            f"{minutes(seconds)} is too short: converting alone is expected to take {minutes(convert * _MEASURING)}; "
            "give more --time, or --effort quick"
        )
    tokens = int(left / pace.heal_seconds(config, recipe, 1))
    return min(tokens, EFFORTS["best"].healed) if tokens >= _LEAST_HEALED else 0
