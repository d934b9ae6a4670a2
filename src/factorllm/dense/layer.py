"""One decoder layer of a dense model at a time, with its weights in memory only while it is used.

The layer's own forward of transformers does all but the FFN: whatever kind of attention it has, it is computed by the
code that the model was made for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from factorllm.dense.families import activation, family_of, ffn_layers, residual_factor
from factorllm.dense.ffn import FFN
from factorllm.dense.model import ModelSource
from factorllm.dense.modules import decoder_layers, final_norm, forwarding, has_weights
from factorllm.dense.names import layer_prefix
from factorllm.dense.sequences import TEXT, Beside


def ffn_of(layer: nn.Module, config: PreTrainedConfig) -> FFN:
    """The FFN of a decoder layer in transformers."""
    family = family_of(config)
    return family.ffn.of_layer(layer, activation(config))


class DecoderLayer:
    """One decoder layer of the dense model, with its weights on the device."""

    def __init__(self, module: nn.Module, index: int, calls: Calls):
        self._module, self._index, self._calls = module, index, calls

    def forward(self, stream: Tensor, beside: Beside = TEXT) -> Tensor:
        """The whole dense layer, and what the model adds after it: (sequences, length, d) -> the same.

        Args:
            beside: what the layer is told of the sequences.
        """
        output = self._calls(stream, beside.positions)[self._index](self._module, stream)
        added = beside.added(self._index)
        return output if added is None else output + added.to(output)


class DenseLayer(DecoderLayer):
    """One that has an FFN.

    Attributes:
        ffn: its FFN.
        residual: what the FFN's output is multiplied with before it is added to the stream.
        norm_follows: whether a norm comes between the FFN and the stream, which is then not linear in the FFN's output.
    """

    def __init__(self, module: nn.Module, index: int, calls: Calls, config: PreTrainedConfig):
        super().__init__(module, index, calls)
        family = family_of(config)
        self._ffn_module = module.get_submodule(family.ffn.slot)
        self.ffn = ffn_of(module, config)
        self.residual, self.norm_follows = residual_factor(config), family.norm_follows

    def attend(self, stream: Tensor, beside: Beside = TEXT) -> tuple[Tensor, Tensor]:
        """Everything before the FFN, and what the model adds after the layer.

        Args:
            stream: (sequences, length, d) before the layer.
            beside: what the layer is told of the sequences.

        Returns:
            The stream that the FFN's output is added to, (sequences, length, d); and what the FFN and the router read,
            (tokens, d).
        """
        seen: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros_like(x)

        with forwarding([self._ffn_module], record):
            middle = self.forward(stream, beside)
        return middle, seen[0].flatten(0, 1)

    def after(self, stream: Tensor, middle: Tensor, output: Tensor, beside: Beside = TEXT) -> Tensor:
        """The stream after the layer, were `output` what the FFN gives.

        Args:
            stream, middle: (sequences, length, d), as `attend` takes and gives them.
            output: (tokens, d).
            beside: as `attend` takes it.
        """
        output = output.view_as(middle).to(middle.dtype)
        if not self.norm_follows:
            return middle + self.residual * output
        with forwarding([self._ffn_module], lambda _: output):
            return self.forward(stream, beside)


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the stream: masks and positions, for one sequence or for each."""

    arguments: tuple = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module, stream: Tensor) -> Tensor:
        output = module(stream, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


Calls = Callable[[Tensor, Tensor | None], list[Call]]
"""What each layer is called with, for a stream (sequences, length, d) and positions, (axes, sequences, length) or None.
"""


class LayerLoader:
    """Loads decoder layers of a dense model, one at a time."""

    def __init__(self, source: ModelSource, length: int, dtype: torch.dtype, device: torch.device):
        self._source, self._dtype, self._device = source, dtype, device
        self._model = source.skeleton()
        for module in self._model.get_decoder().children():
            if not has_weights(module):
                module.to(device)  # the tables of positions
        one = torch.zeros(1, length, source.config.hidden_size, dtype=dtype, device=device)
        self._of_text = record_calls(self._model, one)

    def calls(self, stream: Tensor, positions: Tensor | None = None) -> list[Call]:
        """What each layer is called with; for text, with what is the same for each sequence."""
        if positions is None:
            return self._of_text
        return record_calls(self._model, stream, position_ids=positions.to(self._device))

    def load(self, index: int) -> DecoderLayer:
        """Decoder layer `index`, a `DenseLayer` where it has an FFN; its weights are freed with the returned object."""
        # A copy of the empty one, so that nothing outlives the layer.
        module = copy.deepcopy(decoder_layers(self._model)[index])
        self._source.fill(module, self._dtype, self._device, layer_prefix(index))
        if index not in ffn_layers(self._source.config):
            return DecoderLayer(module, index, self.calls)
        return DenseLayer(module, index, self.calls, self._source.config)


@torch.no_grad()
def record_calls(model: PreTrainedModel, stream: Tensor, **options) -> list[Call]:
    """What a model calls each of its layers with, for a stream (sequences, length, d). Its weights are not used.

    Args:
        options: of the call of its decoder.
    """
    decoder, calls = model.get_decoder(), []

    def record(stream: Tensor, *arguments, **keywords) -> Tensor:
        calls.append(Call(arguments, keywords))
        return stream

    with forwarding(decoder.layers, record), forwarding([final_norm(decoder)], lambda stream: stream):
        decoder(inputs_embeds=stream, use_cache=False, **options)
    return calls
