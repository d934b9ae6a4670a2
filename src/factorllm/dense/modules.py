"""The parts of a causal language model in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from factorllm.dense.families import ffn_layers


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def layers_with_ffn(model: PreTrainedModel) -> list[nn.Module]:
    """Those of them that have an FFN."""
    return [decoder_layers(model)[index] for index in ffn_layers(model.config)]


def has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm after the last layer: what has weights and is neither the embeddings nor a layer."""
    others = (decoder.get_input_embeddings(), decoder.layers)
    (norm,) = (module for module in decoder.children() if module not in others and has_weights(module))
    return norm


def final_norm_names(model: PreTrainedModel) -> list[str]:
    """The names of its weights in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in final_norm(model.get_decoder()).parameters()]


@contextmanager
def forwarding(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let modules compute something else while the block runs."""
    modules = list(modules)
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def experts_of(layer: nn.Module) -> list[nn.Module]:
    """What holds a layer's routed experts, one module at most."""
    return [module for module in layer.modules() if type(module).__name__.endswith("Experts")]


def expert_hidden(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """What goes into the down projection of one of a layer's experts: (n, d) -> (n, width)."""
    if not experts.has_gate:
        active: Tensor = experts.act_fn(linear(hidden, experts.up_proj[expert]))
        return active
    gate, up = linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


class _Output:
    """What a decoder gives: its last states, and nothing of what it could give as well."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What a model's output head makes of the states after the final norm, scaled as its family does: (n, d) -> (n,
    vocabulary). Nothing else of the model runs."""
    output = _Output(states[None])
    with forwarding([model.get_decoder()], lambda *_, **__: output):
        logits: Tensor = model(inputs_embeds=states[None], use_cache=False).logits
    return logits[0]
