"""Which parameters of a loaded student learn."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.heal.settings import HealSettings
from factorllm.route.loaded import is_router

_LEARNS = {
    "router": is_router,
    "experts": lambda name: is_router(name) or ".experts." in name,
    "ffn": lambda name: ".layers." in name and "self_attn" not in name and "norm" not in name,
    "all": lambda name: True,
}


def set_learning(model: PreTrainedModel, settings: HealSettings) -> nn.Module:
    """Freeze what shall not learn; for `lora`, add the adapters.

    Returns:
        The model to train.

    Raises:
        FactorLLMError: when there would be nothing to learn, or peft is not installed.
    """
    if settings.train == "lora":
        return _with_adapters(model, settings.lora_rank)
    learns = _LEARNS[settings.train]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FactorLLMError(
            f"a static prune has no {settings.train} to train, it is a plain dense model; use --train ffn or all"
        )
    return model


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise FactorLLMError("--train lora needs peft: pip install 'factorllm[train]'") from None
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {
        ".".join(name.split(".")[-2:])
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(linear - {"lm_head", "shared_expert_gate"}),
        target_parameters=sorted(experts) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
