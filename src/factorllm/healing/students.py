"""Which parameters of a loaded student learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.healing.settings import HealSettings
from factorllm.hosts import host_of
from factorllm.recipe import Recipe
from factorllm.student.routers import is_router

if TYPE_CHECKING:
    from peft import LoraConfig

_LEARNS = {
    "router": is_router,
    "experts": lambda name: is_router(name) or ".experts." in name,
    "all": lambda name: True,
}


def has_soft_gates(made: dict, recipe: Recipe) -> bool:
    """Whether an earlier healing gave a student ordinary soft gates, so that its routers are not flattened any more.

    Args:
        made: its `factorllm.json`.
    """
    healing = made.get("healing") or {}
    became = healing.get("settings", {}).get("gates") == "soft" and bool(healing.get("best_step"))
    return not recipe.is_prune and bool(healing.get("soft_gates", became))


def check_learning(settings: HealSettings, recipe: Recipe, soft_gates: bool) -> None:
    """Refuse before the work what could not be trained.

    Args:
        soft_gates: whether the student's are so already.

    Raises:
        FactorLLMError: when there would be nothing to learn, gates would be taken for others, or peft is not installed.
    """
    if settings.train in ("router", "experts") and recipe.is_prune:
        raise FactorLLMError(
            f"a static prune has no {settings.train} to train, it is a plain dense model; use --train ffn or all"
        )
    adapters = f"with --train {settings.train}" if settings.has_adapters else None
    where = "in a static prune" if recipe.is_prune else adapters
    if where and (settings.coordinate or settings.gates == "all-experts"):
        option = "--coordinate" if settings.coordinate else "--gates all-experts"
        raise FactorLLMError(f"no router learns {where}, so {option} has nothing to do; leave it out")
    if soft_gates and settings.gates != "soft":
        raise FactorLLMError(
            "the student was healed with --gates soft, and its routers are no longer flattened, as --gates "
            f"{settings.gates} takes them to be; use --gates soft"
        )
    if settings.train == "mor1e" and settings.gates == "soft" and not soft_gates and not recipe.is_prune:
        raise FactorLLMError(
            "--train mor1e leaves the student's own weights as they are, its routers' too, so --gates soft would train "
            "adapters of another student; leave it out"
        )
    if settings.has_adapters and find_spec("peft") is None:
        raise FactorLLMError(f"--train {settings.train} needs peft: pip install 'factorllm[train]'")


def drop_nothing(model: nn.Module) -> None:
    """Let a model compute the same while it learns as it does otherwise: some families' configs ask for dropout, and
    the teacher's words, which are learned from, are those of a whole model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, int | float):
                setattr(module, name, 0.0)


def set_learning(model: PreTrainedModel, settings: HealSettings) -> nn.Module:
    """Freeze what shall not learn; for `lora`, add the adapters.

    Returns:
        The model to train.
    """
    if settings.train == "lora":
        return _with_adapters(model, settings.lora_rank)
    host = host_of(model.config)
    learns = _LEARNS.get(settings.train, lambda name: host.is_of_ffn(name, model.config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    return model


def with_adapters_of(model: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """The model with adapters of what peft's config names, and of nothing else."""
    from peft import get_peft_model

    with _names_as_they_are():
        return get_peft_model(model, config)


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """peft takes `gate_proj` and its like, wherever they are, for what routed experts were called before transformers
    5, and adapts those: the shared expert and whole FFNs of some hosts would have no adapters, without a word."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # older ones take every name as it is
        yield
        return
    translate = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = translate


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig

    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_router(f"{name}.weight")
    }
    experts = {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    }
    without = {"lm_head", "shared_expert_gate"}
    if model.config.model_type == "nemotron_h":
        without.add("out_proj")  # peft refuses it: kernels of Mamba read its weight past an adapter
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(linear - without),
        target_parameters=sorted(experts) or None,
        task_type="CAUSAL_LM",
    )
    return with_adapters_of(model, config)
