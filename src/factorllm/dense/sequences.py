"""What a text model is run on: sequences of tokens, some of which may be an image's and bring their own embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Beside:
    """What the layers of a text model are told of a batch of sequences beside the stream.

    Attributes:
        positions: of the tokens, (axes, sequences, length), int64; None where each token has its place.
        added: what the model itself adds to the stream after a layer, by the layer's number: (sequences, length, d), or
            None for nothing (DeepStack, arXiv 2406.04334).
    """

    positions: Tensor | None = None
    added: Callable[[int], Tensor | None] = lambda layer: None


TEXT = Beside()
"""Of sequences of text."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of a text model.

    Attributes:
        tokens: (n, length), int64.
        files: for each sequence with an image, by its number, the file of what the vision tower made of it.
    """

    tokens: Tensor
    files: dict[int, Path]

    def __len__(self) -> int:
        return len(self.tokens)

    def is_image(self, run: slice) -> Tensor:
        """Which tokens of some sequences are of an image: (sequences, length), bool."""
        mask = torch.zeros_like(self.tokens[run], dtype=torch.bool)
        for row, path in self._images(run):
            mask[row] = _read(path, "is_image")
        return mask

    def embed(self, run: slice, of_tokens: Callable[[Tensor], Tensor]) -> Tensor:
        """The stream before the first layer: (sequences, length, d).

        Args:
            of_tokens: embeds tokens of text, (sequences, length).
        """
        mask = self.is_image(run)
        stream = of_tokens(self.tokens[run].masked_fill(mask, 0))
        return self._with_rows(stream, run, "stream")

    def beside(self, run: slice) -> Beside:
        """What the layers are told of some sequences."""
        if not self._images(run):
            return TEXT
        return Beside(self._positions(run), lambda layer: self._added(run, layer))

    def _positions(self, run: slice) -> Tensor | None:
        found = {row: _read(path, "positions") for row, path in self._images(run)}
        axes = {len(positions) for positions in found.values() if positions is not None}
        if not axes:
            return None
        rows, length = self.tokens[run].shape
        positions = torch.arange(length).expand(*axes, rows, length).clone()
        for row, own in found.items():
            positions[:, row] = own
        return positions

    def _added(self, run: slice, layer: int) -> Tensor | None:
        parts = [_read(path, f"added.{layer}") for _, path in self._images(run)]
        if all(part is None for part in parts):
            return None
        width = next(part.shape[1] for part in parts if part is not None)
        return self._with_rows(torch.zeros(*self.tokens[run].shape, width), run, f"added.{layer}")

    def _with_rows(self, states: Tensor, run: slice, name: str) -> Tensor:
        """States of which those of image tokens are what a file says."""
        for row, path in self._images(run):
            if (own := _read(path, name)) is not None:
                states[row, _read(path, "is_image")] = own.to(states)
        return states

    def _images(self, run: slice) -> list[tuple[int, Path]]:
        """The images of some sequences, with the place of the sequence among them."""
        return [
            (row, self.files[number]) for row, number in enumerate(range(run.start, run.stop)) if number in self.files
        ]


def _read(path: Path, name: str) -> Tensor | None:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118  it is no mapping
