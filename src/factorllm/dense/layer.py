"""One decoder layer of a dense model at a time, with its weights in memory only while it is used.

The layer's own forward of transformers does all but the FFN: whatever kind of attention it has, it is computed by the
code that the model was made for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from factorllm.dense.families import activation, family_of, residual_factor
from factorllm.dense.ffn import FFN
from factorllm.dense.model import ModelSource
from factorllm.dense.modules import decoder_layers, final_norm, forwarding, has_weights
from factorllm.dense.names import layer_prefix


def ffn_of(layer: nn.Module, config: PreTrainedConfig) -> FFN:
    """The FFN of a decoder layer in transformers."""
    family = family_of(config)
    return family.ffn.of_layer(layer, activation(config))


class DenseLayer:
    """One decoder layer of the dense model, with its weights on the device.

    Attributes:
        ffn: its FFN.
        residual: what the FFN's output is multiplied with before it is added to the stream.
        norm_follows: whether a norm comes between the FFN and the stream, which is then not linear in the FFN's output.
    """

    def __init__(self, module: nn.Module, call: _Call, config: PreTrainedConfig):
        family = family_of(config)
        self._module, self._call = module, call
        self._ffn_module = module.get_submodule(family.ffn.slot)
        self.ffn = ffn_of(module, config)
        self.residual, self.norm_follows = residual_factor(config), family.norm_follows

    def attend(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Everything before the FFN.

        Args:
            stream: (sequences, length, d) before the layer.

        Returns:
            The stream that the FFN's output is added to, (sequences, length, d); and what the FFN and the router read,
            (tokens, d).
        """
        seen: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros_like(x)

        with forwarding([self._ffn_module], record):
            middle = self.forward(stream)
        return middle, seen[0].flatten(0, 1)

    def forward(self, stream: Tensor) -> Tensor:
        """The whole dense layer: (sequences, length, d) -> the same."""
        return self._call(self._module, stream)

    def after(self, stream: Tensor, middle: Tensor, output: Tensor) -> Tensor:
        """The stream after the layer, were `output` what the FFN gives.

        Args:
            stream, middle: (sequences, length, d), as `attend` takes and gives them.
            output: (tokens, d).
        """
        output = output.view_as(middle).to(middle.dtype)
        if not self.norm_follows:
            return middle + self.residual * output
        with forwarding([self._ffn_module], lambda _: output):
            return self.forward(stream)


@dataclass(frozen=True)
class _Call:
    """What a layer is called with beside the stream: masks and positions, for one sequence."""

    arguments: tuple = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module, stream: Tensor) -> Tensor:
        output = module(stream, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


class LayerLoader:
    """Loads decoder layers of a dense model, one at a time."""

    def __init__(self, source: ModelSource, length: int, dtype: torch.dtype, device: torch.device):
        self._source, self._dtype, self._device = source, dtype, device
        model = source.skeleton()
        self._layers = decoder_layers(model)
        self._calls = _record_calls(model, length, dtype, device)

    def __len__(self) -> int:
        return len(self._layers)

    def load(self, index: int) -> DenseLayer:
        """Decoder layer `index`; its weights are freed with the returned object."""
        module = self._layers[index]
        self._source.fill(module, self._dtype, self._device, layer_prefix(index))
        # The module is only a way to compute: replace it by an empty one, so that nothing outlives the layer.
        self._layers[index] = nn.Identity()
        return DenseLayer(module, self._calls[index], self._source.config)


@torch.no_grad()
def _record_calls(model: PreTrainedModel, length: int, dtype: torch.dtype, device: torch.device) -> list[_Call]:
    """What a model calls each of its layers with, for a sequence of `length` tokens. Its weights are not used."""
    decoder, calls = model.get_decoder(), []

    def record(stream: Tensor, *arguments, **keywords) -> Tensor:
        calls.append(_Call(arguments, keywords))
        return stream

    for module in decoder.children():
        if not has_weights(module):
            module.to(device)  # the tables of positions
    stream = torch.zeros(1, length, model.config.hidden_size, dtype=dtype, device=device)
    with forwarding(decoder.layers, record), forwarding([final_norm(decoder)], lambda stream: stream):
        decoder(inputs_embeds=stream, use_cache=False)
    return calls
