"""The student in memory: its routers, and which of its parameters learn."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.heal.settings import HealSettings
from factorllm.route import FLATTEN


class Routers:
    """The routers of a student, layer by layer, and the logits of their last forward pass.

    They compute in fp32 also where autocast is on, so that training routes as the finished checkpoint does.
    """

    def __init__(self, model: nn.Module):
        self.modules = [module for module in model.modules() if type(module).__name__.endswith("Router")]
        self._logits: list[Tensor] = []
        for module in self.modules:
            _in_fp32(module)
            module.register_forward_hook(self._record)

    def _record(self, _module: nn.Module, _inputs: tuple, output: tuple[Tensor, ...]) -> None:
        self._logits.append(output[0])

    def start(self) -> None:
        """Forget the logits; to be called before a forward pass."""
        self._logits.clear()

    def logits(self, soft: bool) -> Tensor:
        """Unflattened router logits of the last forward pass: (tokens, layers, N), fp32.

        Args:
            soft: whether the router's weights are unflattened already. If not, the gradient is passed straight through
                the factor, so that it has the size of the gate weights' own.
        """
        logits = torch.stack([logits.float() for logits in self._logits[: len(self.modules)]], dim=1)
        return logits if soft else logits + (logits / FLATTEN - logits).detach()

    @property
    def top_k(self) -> int:
        return self.modules[0].top_k

    @torch.no_grad()
    def unflatten(self) -> None:
        """Make the gate weights the ordinary soft ones."""
        for module in self.modules:
            module.weight.div_(FLATTEN)


def _in_fp32(router: nn.Module) -> None:
    forward = router.forward

    def full_precision(hidden: Tensor, *args, **kwargs):
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float(), *args, **kwargs)

    router.forward = full_precision


_ROUTER = re.compile(r"\.(router|gate)\.weight$")


def is_router(name: str) -> bool:
    """Whether a parameter of a student is a router's weight."""
    return bool(_ROUTER.search(name)) and ".shared" not in name


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
