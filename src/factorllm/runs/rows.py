"""Arrays of hidden states and activations, in bounded memory: in files, and in runs of sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from factorllm.runs.ranks import Ranks

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once: enough for fast matrix products, few enough for the caches of a CPU."""


class Rows:
    """A (sequences, length, width) array, written and read in runs of sequences; in memory, or in a file.

    Files are read and written in plain blocks, not mapped, so they do not count as the process's memory.

    Args:
        path: the file, or None to keep the array in memory.
        ranks: the processes that work on the array, each on its share of the sequences; None for one process.
        beside: an array of the same sequences whose shares are this one's too. Those of `ranks` are cut where batches
            end, which depends on the length.
    """

    def __init__(
        self,
        path: Path | None,
        sequences: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        beside: Rows | None = None,
    ):
        self.path, self.sequences, self.length, self.width, self.dtype = path, sequences, length, width, dtype
        self._step = max(BATCH_TOKENS // length, 1)
        self._share = ranks.share(sequences, self._step) if ranks else slice(0, sequences)
        if beside is not None:
            self._share = beside._share
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
