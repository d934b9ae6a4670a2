"""The routers of a student that is loaded in transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.convert.partition.energy import expert_picks
from factorllm.convert.route.router import FLATTEN
from factorllm.hosts import host_of

_CLASSES = ("Router", "MoEV1Gate")
"""What the names of transformers' classes of routers end with."""

_WEIGHT = re.compile(r"\.(router|gate)(\.wg|\.proj)?\.weight$")


class Routers:
    """The routers of a student, layer by layer, and the logits of their last forward pass.

    They compute in fp32 also where autocast is on, so that training routes as the finished checkpoint does.
    """

    def __init__(self, model: PreTrainedModel):
        self.modules = [module for module in model.modules() if type(module).__name__.endswith(_CLASSES)]
        self.top_k = host_of(model.config).shape(model.config).top_k
        self._logits: list[Tensor] = []
        self._unflattened = False
        for module in self.modules:
            _in_fp32(module)
            module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, _inputs: tuple, output: tuple[Tensor, ...]) -> None:
        # Gemma's give probabilities, whose logarithms are logits too.
        self._logits.append(output[0].log() if type(module).__name__.startswith("Gemma4") else output[0])

    def start(self) -> None:
        """Forget the logits; to be called before a forward pass."""
        self._logits.clear()

    def logits(self, soft: bool) -> Tensor:
        """Unflattened router logits of the last forward pass: (tokens, FFNs, N), fp32.

        Args:
            soft: whether the router's weights are unflattened already. If not, the gradient is passed straight through
                the factor, so that it has the size of the gate weights' own.
        """
        logits = torch.stack([logits.float() for logits in self._logits[: len(self.modules)]], dim=1)
        return logits if soft else _unflattened(logits)

    def latest(self) -> Tensor:
        """Unflattened logits of the router that ran last, of those that are flattened: (tokens, N), fp32."""
        return _unflattened(self._logits[-1].float())

    def picks(self) -> Tensor:
        """Which experts ran in the last forward pass: (tokens, FFNs, N), bool."""
        logits = self.logits(soft=True)
        return expert_picks(logits.flatten(0, 1), self.top_k).view_as(logits).bool()

    @torch.no_grad()
    def unflatten(self) -> None:
        """Make the gate weights the ordinary soft ones."""
        for module in self.modules:
            router_weight(module).div_(FLATTEN)
        self._unflattened = True

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """In the block, routers that were unflattened are as they were before: a power of two takes no bit."""
        weights = [router_weight(module) for module in self.modules] if self._unflattened else []
        with torch.no_grad():
            for weight in weights:
                weight.mul_(FLATTEN)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight in weights:
                    weight.div_(FLATTEN)


def _unflattened(logits: Tensor) -> Tensor:
    """The gradient passes straight through the factor."""
    return logits + (logits / FLATTEN - logits).detach()


def _in_fp32(router: nn.Module) -> None:
    forward = router.forward

    def full_precision(hidden: Tensor, *args, **kwargs):
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float(), *args, **kwargs)

    router.forward = full_precision


def is_router(name: str) -> bool:
    """Whether a parameter of a student is a router's weight."""
    return bool(_WEIGHT.search(name)) and ".shared" not in name


def router_weight(router: nn.Module) -> nn.Parameter:
    """The matrix of a router: (N, d)."""
    (weight,) = (parameter for parameter in router.parameters() if parameter.dim() == 2 and len(parameter) > 1)
    return weight
