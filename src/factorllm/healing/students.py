"""Which parameters of a loaded student learn."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.healing.settings import HealSettings
from factorllm.hosts import host_of
from factorllm.recipe import Recipe
from factorllm.student.routers import is_router

_LEARNS = {
    "router": is_router,
    "experts": lambda name: is_router(name) or ".experts." in name,
    "all": lambda name: True,
}


def check_learning(settings: HealSettings, recipe: Recipe) -> None:
    """Refuse before the work what could not be trained.

    Raises:
        FactorLLMError: when there would be nothing to learn, or peft is not installed.
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
    if settings.has_adapters and find_spec("peft") is None:
        raise FactorLLMError(f"--train {settings.train} needs peft: pip install 'factorllm[train]'")


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


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
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
    return get_peft_model(model, config)
