"""One decoder layer of a dense model at a time, with its weights in memory only while it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorllm.dense import ModelSource
from factorllm.dense.ffn import FFN


class DenseLayer:
    """One decoder layer of the dense model, with its weights on the device."""

    def __init__(self, module: nn.Module, position_embeddings: tuple[Tensor, Tensor]):
        self._module, self._position_embeddings = module, position_embeddings
        mlp = module.mlp
        self.ffn = FFN(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def attend(self, stream: Tensor) -> Tensor:
        """The stream after attention, before the FFN: (sequences, length, d) -> the same."""
        attended, _ = self._module.self_attn(
            hidden_states=self._module.input_layernorm(stream),
            position_embeddings=self._position_embeddings,
            attention_mask=None,  # sdpa is causal then; sequences are never longer than a sliding window
        )
        return stream + attended

    def ffn_input(self, stream: Tensor) -> Tensor:
        """The normalised stream that the FFN and the router read: (sequences, length, d) -> (tokens, d)."""
        return self._module.post_attention_layernorm(stream).flatten(0, 1)

    def forward(self, stream: Tensor) -> Tensor:
        """The whole dense layer: (sequences, length, d) -> the same."""
        middle = self.attend(stream)
        output = self.ffn.hidden(self.ffn_input(middle)) @ self.ffn.down.T
        return middle + output.view_as(middle)


class LayerLoader:
    """Loads decoder layers of a dense model, one at a time."""

    def __init__(self, source: ModelSource, length: int, dtype: torch.dtype, device: torch.device):
        self._source, self._dtype, self._device = source, dtype, device
        base = source.skeleton().model
        self._layers = base.layers
        # The rotary tables are the same for every layer; they depend on positions only.
        like = torch.empty(1, dtype=dtype, device=device)
        self._positions = base.rotary_emb.to(device)(like, torch.arange(length, device=device)[None])

    def __len__(self) -> int:
        return len(self._layers)

    def embeddings(self) -> Tensor:
        """The embedding table: (vocabulary, d), on the CPU."""
        return self._source.tensor("model.embed_tokens.weight").to(self._dtype)

    def load(self, index: int) -> DenseLayer:
        """Decoder layer `index`; its weights are freed with the returned object."""
        module = self._layers[index]
        weights = {
            name: self._source.tensor(f"model.layers.{index}.{name}").to(self._device, self._dtype)
            for name, _ in module.named_parameters()
        }
        # The module is only a way to compute: replace it by an empty one, so that nothing outlives the layer.
        self._layers[index] = nn.Identity()
        module.load_state_dict(weights, assign=True)
        return DenseLayer(module.requires_grad_(False), self._positions)
