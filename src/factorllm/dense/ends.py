"""What a dense model does before its first layer and after its last one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from factorllm.dense.model import ModelSource
from factorllm.dense.modules import final_norm, final_norm_names, forwarding

_ROWS = 256  # tokens of which logits are made at once


class _EnoughError(Exception):
    """Leaves a forward pass of which no more is wanted."""


class Ends:
    """Embeddings, final norm and output head of a dense model, in fp32, with whatever scales its family applies."""

    def __init__(self, source: ModelSource, device: torch.device):
        self._device = device
        self._model = source.skeleton()
        decoder = self._model.get_decoder()
        self._layers, self._norm = decoder.layers, final_norm(decoder)
        decoder.layers = nn.ModuleList()
        source.fill(self._model, torch.float32, device)
        decoder.layers = self._layers  # without weights: others stand in for them

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The stream before the first layer: (sequences, length) ids -> (sequences, length, d), fp32."""
        streams: list[Tensor] = []

        def stop(stream: Tensor, *_, **__) -> Tensor:
            streams.append(stream)
            raise _EnoughError

        try:
            self._run(tokens, stop)
        except _EnoughError:
            return streams[0]
        raise AssertionError("a model without layers")

    @torch.no_grad()
    def logits(self, stream: Tensor) -> Tensor:
        """What the model makes of its stream after the last layer: (n, d) -> (n, vocabulary), fp32."""
        parts = []
        for rows in stream.to(self._device).float().split(_ROWS):
            tokens = torch.zeros(len(rows), 1, dtype=torch.long)
            parts.append(self._run(tokens, lambda *_, rows=rows, **__: rows[:, None])[:, 0])
        return torch.cat(parts)

    def scaled_norm(self, scale: float) -> dict[str, Tensor]:
        """The final norm's weights, fp32, by their names in the model, with its output `scale` times what it was."""
        centre = 1.0 if _is_zero_centred(self._norm) else 0.0
        weights = zip(final_norm_names(self._model), self._norm.parameters(), strict=True)
        return {
            name: weight * scale if name.endswith(".bias") else (weight + centre) * scale - centre
            for name, weight in weights
        }

    def _run(self, tokens: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        with forwarding(self._layers, layer):
            return self._model(input_ids=tokens.to(self._device), use_cache=False).logits


def _is_zero_centred(norm: nn.Module) -> bool:
    """Whether a norm multiplies with 1 + its weight."""
    nothing = {name: torch.zeros_like(weight) for name, weight in norm.named_parameters()}
    some = torch.arange(len(nothing["weight"])).to(nothing["weight"])  # whose mean some norms take away
    return bool(functional_call(norm, nothing, (some,)).any())
