"""Hidden states of teacher and student, one decoder layer at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from factorllm.ffn import FFN
from factorllm.ranks import Ranks
from factorllm.sources import ModelSource

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once: enough for fast matrix products, few enough for the caches of a CPU."""


class Rows:
    """A (sequences, length, width) array, written and read in runs of sequences; in memory, or in a file.

    Files are read and written in plain blocks, not mapped, so they do not count as the process's memory.

    Args:
        path: the file, or None to keep the array in memory.
        ranks: the processes that work on the array, each on its share of the sequences; None for one process.
    """

    def __init__(
        self,
        path: Path | None,
        sequences: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ):
        self.path, self.sequences, self.length, self.width, self.dtype = path, sequences, length, width, dtype
        self._step = max(BATCH_TOKENS // length, 1)
        self._share = ranks.share(sequences, self._step) if ranks else slice(0, sequences)
        self._memory = torch.empty(sequences, length, width, dtype=dtype) if path is None else None
        if path is not None and not path.exists():
            path.touch()

    @property
    def _sequence_bytes(self) -> int:
        return self.length * self.width * self.dtype.itemsize

    def write(self, run: slice, values: Tensor) -> None:
        """Store the sequences of `run`; `values` is (sequences, length, width), or the same with tokens flattened."""
        values = values.detach().to("cpu", self.dtype).reshape(-1, self.length, self.width).contiguous()
        if self._memory is not None:
            self._memory[run] = values
            return
        with self.path.open("r+b") as file:
            file.seek(run.start * self._sequence_bytes)
            file.write(memoryview(values.view(torch.uint8).numpy()).cast("B"))

    def read(self, run: slice, device: torch.device | str = "cpu") -> Tensor:
        """The sequences of `run`: (sequences, length, width)."""
        if self._memory is not None:
            return self._memory[run].to(device)
        buffer = bytearray((run.stop - run.start) * self._sequence_bytes)
        with self.path.open("rb") as file:
            file.seek(run.start * self._sequence_bytes)
            if file.readinto(buffer) != len(buffer):
                raise OSError(f"{self.path} is shorter than it should be")
        return torch.frombuffer(buffer, dtype=self.dtype).view(-1, self.length, self.width).to(device)

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """Runs of sequences of about `BATCH_TOKENS` tokens that cover this process's share of start..stop."""
        stop = self.sequences if stop is None else stop
        return self._runs(max(start, self._share.start), min(stop, self._share.stop))

    def all_runs(self) -> Iterator[slice]:
        """The same for the whole array."""
        return self._runs(0, self.sequences)

    def _runs(self, start: int, stop: int) -> Iterator[slice]:
        for first in range(start, stop, self._step):
            yield slice(first, min(first + self._step, stop))

    def digest(self) -> str:
        """xxh3-64 of a file-backed array, in hexadecimal."""
        digest = xxhash.xxh3_64()
        for run in self.all_runs():
            digest.update(memoryview(self.read(run).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


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
