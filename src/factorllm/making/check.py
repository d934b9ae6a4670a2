"""What a later step of a plan would refuse is refused before the first one."""

from __future__ import annotations

from factorllm.dense import open_model
from factorllm.dense.families import ffn_width
from factorllm.dense.headers import read_dense_config
from factorllm.engines import check_installed
from factorllm.errors import FactorLLMError
from factorllm.exporting.gguf_file import check_type
from factorllm.exporting.plan import file_types
from factorllm.exporting.tokenizer import check_tokenizer
from factorllm.healing.rounding import check_rounding
from factorllm.healing.students import check_learning
from factorllm.hosts import HOSTS, choose_host
from factorllm.making.plan_file import MakePlan
from factorllm.measure.tasks import check_tasks
from factorllm.recipe import Recipe, parse_recipe


def check_plan(plan: MakePlan) -> None:
    """Refuse a plan one of whose later steps cannot be done here: the first ones may take hours.

    Raises:
        FactorLLMError: as that step would.
    """
    recipe, how, asked = parse_recipe(plan.recipe), plan.export, plan.evaluate
    check_type(how.type, "the text" if how.weighed or how.gptq else None, gptq=how.gptq)
    if reason := _reason_against_file(plan, recipe):
        raise FactorLLMError(
            f"make writes a GGUF file, and of {plan.model} as {recipe.name} it cannot: {reason}; use factorllm "
            "factorize, and serve that with transformers or vLLM"
        )
    _check_tokenizer(plan.model)
    if plan.heal:
        check_learning(plan.heal, recipe, soft_gates=False)
        check_rounding(plan.heal)
    check_tasks(asked.tasks, asked.data, asked.run_generated_code)
    for name in ("bench", "front"):
        if getattr(plan, name) and (reason := reason_against_timing(plan.model)):
            raise FactorLLMError(f"{name}: {reason}; or write `{name}: null` in the plan")
    if plan.front:
        file_types(plan.front.types)


def _reason_against_file(plan: MakePlan, recipe: Recipe) -> str | None:
    """Why llama.cpp has no such student, or computes another one."""
    config = read_dense_config(plan.model)
    shape = recipe.shape(ffn_width(config))
    host = choose_host(plan.factorize.host, config, shape) if shape.experts else HOSTS["dense"]
    return host.reason_against_gguf(config)


def _check_tokenizer(model: str) -> None:
    tokenizer = open_model(model).tokenizer()
    try:
        check_tokenizer(tokenizer)
    except FactorLLMError as error:
        raise FactorLLMError(
            f"make writes a GGUF file, and of {model} it cannot, so use factorllm factorize, then export or serve: "
            f"{error}"
        ) from None


def reason_against_timing(model: str) -> str | None:
    """Why a student cannot be timed against its dense model here, with what to do; None where it can."""
    try:
        check_installed("llamacpp")
    except FactorLLMError as error:
        return str(error)
    reason = HOSTS["dense"].reason_against_gguf(read_dense_config(model))
    return reason and f"the dense model cannot be timed beside it, for {reason}"
