"""`plan.yaml`: every number that was chosen, written before anything is made, and read again."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from factorllm.errors import FactorLLMError, first_problem, refusing
from factorllm.healing.settings import HealSettings
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.settings import EvalSettings
from factorllm.measure.speed.plan import Plan
from factorllm.runs.given import given
from factorllm.runs.settings import Chosen, Settings, Tokens
from factorllm.runs.workspace import write_text

_HEAD = "# What factorllm makes here. Edit it, and `factorllm make {name}` makes that instead.\n"

Given = Annotated[str, BeforeValidator(lambda value: given(value) if isinstance(value, str | Path) else value)]
"""A path or an id; written as text."""


class SampleStep(Chosen):
    """Text that the dense model says by itself."""

    tokens: Tokens
    chat: bool = False
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class ExportStep(Chosen):
    """The GGUF file, and whether it is weighed by the text."""

    type: str = "q8_0"
    weighed: bool = False
    gptq: bool = False


class MakePlan(Chosen):
    """All steps from a dense model to one that is used. Unknown keys are refused.

    Attributes:
        model: the dense model, as `factorize` takes it.
        recipe: of the student, as `factorize` takes it.
        text: text as for `factorize`; null to sample it first.
        vocabulary: tokens that stay of the dense model's, counted in the text; null for all.
        sample: how, where there is no text.
        factorize: settings of the conversion.
        heal: settings of healing; null to leave it out.
        export: the GGUF file.
        evaluate: tasks; perplexity and agreement on the held-out text are measured always.
        bench: what is timed; null to leave it out.
        front: the student's files beside those of the quantised dense model; null to leave it out.

    Example:
        >>> MakePlan(model="dense", recipe="S2A2E8", text="my-text.txt").export.type
        'q8_0'
    """

    model: Given
    recipe: Given
    text: Given | None = None
    vocabulary: int | None = Field(default=None, gt=0)
    sample: SampleStep | None = None
    factorize: Settings = Settings()
    heal: HealSettings | None = None
    export: ExportStep = ExportStep()
    evaluate: EvalSettings = EvalSettings(tasks=())
    bench: Plan | None = None
    front: FrontPlan | None = None
    engine: Literal["llamacpp"] = "llamacpp"

    @model_validator(mode="after")
    def _has_text(self) -> MakePlan:
        if self.text is None and self.sample is None:
            raise ValueError(
                "there is neither a text nor how to sample one: give `text:` or `sample: {tokens: 100000}`"
            )
        return self

    @model_validator(mode="after")
    def _counts_in_text(self) -> MakePlan:
        if self.vocabulary and self.text is None:
            raise ValueError("which tokens stay is counted in a text: give `text:`, or leave out `vocabulary:`")
        return self

    @model_validator(mode="after")
    def _makes_one_file(self) -> MakePlan:
        if self.heal and self.heal.train == "mor1e":
            raise ValueError(
                "heal.train: mor1e makes an adapter for each kind of text, which the file here would lack; use "
                "another, or factorllm heal and export"
            )
        return self

    def write(self, path: str | Path) -> None:
        """Write it, with every number that was chosen."""
        content = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(Path(given(path)), _HEAD.format(name=quote(str(path))) + content)


def read_plan(path: Path) -> MakePlan:
    """Read a plan.

    Raises:
        FactorLLMError: for a file that is none, naming the key.
    """
    with refusing(path, "write it by factorllm make MODEL -o OUT, and edit that"):
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise FactorLLMError(
            f"{path} holds no keys such as `model:` and `recipe:`; factorllm make MODEL -o OUT writes one"
        )
    try:
        return MakePlan(**content)
    except ValidationError as error:
        raise FactorLLMError(f"{path}: {first_problem(error)}; mend it there") from None
