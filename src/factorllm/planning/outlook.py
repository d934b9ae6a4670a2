"""`plan()`: what each shape would cost and give, before anything is made, and which of them a wish means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig

from factorllm.dense.headers import read_dense_header
from factorllm.errors import FactorLLMError
from factorllm.exporting.plan import file_types
from factorllm.planning import TYPES
from factorllm.planning.forecast import Expected, forecast
from factorllm.planning.pace import Pace
from factorllm.planning.quality import Measured, known_quality
from factorllm.planning.stand_in import with_tokens
from factorllm.planning.wish import Wish
from factorllm.runs.apart import apart
from factorllm.runs.given import given, given_count
from factorllm.runs.progress import minutes
from factorllm.trimming import VOCABULARY
from factorllm.trimming.choose import check_trim

TOKENS, HEALED_TOKENS = 49_152, 100_000
"""What the times of a plan are for."""

_MUCH = 0.1  # of the time of a token


@dataclass(frozen=True)
class Choice:
    """A shape in a file type: what it is expected to do, and what is known of its quality.

    Attributes:
        quality: None where nothing like it was measured.
        convert_seconds: for `TOKENS` of calibration text.
        heal_seconds: for `HEALED_TOKENS`.
    """

    expected: Expected
    quality: Measured | None
    convert_seconds: float
    heal_seconds: float


@dataclass(frozen=True)
class Outlook:
    """What can be made of a dense model.

    Attributes:
        choices: the dense model first, for each file type.
        tokens: of the dense model's vocabulary.
        vocabulary: tokens that stay in all but the dense model; None for all.
        text_alone: whether the model takes nothing but text, else `trim` refuses it.
    """

    model: str
    choices: list[Choice]
    tokens: int
    vocabulary: int | None = None
    text_alone: bool = True

    @property
    def advice(self) -> str | None:
        """To leave out tokens, where the output head takes much of a token's time; None where it does not, where
        tokens are few, where they are left out already, or where `trim` would refuse the model."""
        share = max(choice.expected.head_share for choice in self.choices if choice.expected.kind == "dense")
        if not self.text_alone or self.vocabulary is not None or self.tokens < 2 * VOCABULARY or share < _MUCH:
            return None
        return (
            f"its output head of {self.tokens:,} tokens takes up to {share:.0%} of the time of a token: see also "
            f"--vocabulary {VOCABULARY}, which leaves out tokens that your text does not use, and changes no weight"
        )

    def choose(self, wish: Wish, file_type: str) -> Choice:
        """The shape that a wish means: the best one that is fast enough, or the fastest one that keeps enough.

        Where the trimmed model is fast enough that is the best, for it has all of its FFN.

        Raises:
            FactorLLMError: when none is, with the nearest one.
        """
        found = [c for c in self.choices if c.expected.kind != "dense" and c.expected.file_type == file_type]
        if wish.memory is not None:
            found = _those(found, lambda c: wish.memory - c.expected.memory_bytes, _memory, "as small")
        if wish.keep is not None:
            found = _those(
                found, lambda c: _kept(c) - wish.keep, lambda c: f"keeps {_kept(c):.0%}", "known to keep that"
            )
        if wish.speed is not None:
            found = _those(found, lambda c: c.expected.decode_ratio - wish.speed, _speed, "as fast")
            return min(found, key=_loss)
        return max(found, key=lambda c: c.expected.decode_ratio)

    def as_json(self) -> dict[str, Any]:
        said = {"model": self.model, "vocabulary": self.vocabulary, "tokens": TOKENS, "healed_tokens": HEALED_TOKENS}
        return said | {
            "choices": [
                {
                    **asdict(choice.expected),
                    "recipe": choice.expected.recipe and choice.expected.recipe.model_dump(),
                    "kind": choice.expected.kind,
                    "quality": choice.quality and asdict(choice.quality),
                    "convert_seconds": choice.convert_seconds,
                    "heal_seconds": choice.heal_seconds,
                }
                for choice in self.choices
            ]
        }


@apart()
def plan(
    model: str | Path,
    types: Sequence[str] = TYPES,
    vocabulary: int | None = None,
    console: Console | None = None,
) -> Outlook:
    """What the usual shapes of a dense model would cost and give in llama.cpp on this machine.

    Reads the model's config and the names of its tensors only; a folder that holds nothing but a `config.json` will do.

    Args:
        model: a hub id, a folder, or a `.gguf` file.
        types: GGUF file types.
        vocabulary: tokens that `trim` is to leave; None for all.
        console: where progress is shown.

    Raises:
        FactorLLMError: for a model that cannot be read, none of whose shapes llama.cpp has, or whose vocabulary cannot
            be trimmed so; for a type that there is not.

    Example:
        >>> outlook = plan("dense", types=("q8_0",))
        >>> outlook.choices[0].expected.name
        'dense'
    """
    model, types = given(model), file_types(types)
    config, wrapper = read_dense_header(model)
    if vocabulary is not None:
        vocabulary = given_count("--vocabulary", vocabulary)
        check_trim(model, config, wrapper, vocabulary)
    pace = Pace.measure()
    expected = forecast(config, types, vocabulary, console)
    made = config if vocabulary is None else with_tokens(config, vocabulary)
    choices = [_choice(made, model, pace, one) for one in expected]
    return Outlook(model, choices, config.vocab_size, vocabulary, text_alone=wrapper is None)


def _choice(config: PreTrainedConfig, model: str, pace: Pace, expected: Expected) -> Choice:
    if expected.recipe is None:
        return Choice(expected, None, 0.0, 0.0)
    heal = pace.heal_seconds(config, expected.recipe, HEALED_TOKENS)
    return Choice(expected, known_quality(expected.recipe, model), pace.convert_seconds(config, TOKENS), heal)


def _those(
    choices: list[Choice], margin: Callable[[Choice], float], said: Callable[[Choice], str], what: str
) -> list[Choice]:
    """Those whose margin is not negative.

    Raises:
        FactorLLMError: when there is none, with the one that comes nearest.
    """
    if found := [choice for choice in choices if margin(choice) >= 0]:
        return found
    if not choices:
        raise FactorLLMError("no shape of this model is possible in that file type; see factorllm plan")
    nearest = max(choices, key=margin)
    raise FactorLLMError(
        f"no shape is {what}; the nearest is {nearest.expected.name}, which {said(nearest)}. Ask for less, "
        "or see factorllm plan"
    )


def _kept(choice: Choice) -> float:
    if choice.expected.recipe is None:
        return 1.0  # no weight of the trimmed model is another
    return choice.quality.kept or 0.0 if choice.quality else 0.0


def _loss(choice: Choice) -> float:
    if choice.expected.recipe is None:
        return 0.0
    return choice.quality.perplexity if choice.quality else float("inf")


def _speed(choice: Choice) -> str:
    return f"is expected to decode {choice.expected.decode_ratio:.2f} times as fast as the dense model"


def _memory(choice: Choice) -> str:
    return f"takes {choice.expected.memory_bytes / 2**20:.0f} MiB"


def times(choice: Choice) -> str:
    """How long a student takes to make, in words."""
    if choice.expected.recipe is None:
        return "factorllm trim makes it in minutes, and changes no weight"
    return (
        f"converting about {minutes(choice.convert_seconds)} from {TOKENS:,} tokens, healing about "
        f"{minutes(choice.heal_seconds)} on {HEALED_TOKENS:,}"
    )
