"""How much each input channel of each matrix counts when it is quantised: its mean square on a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.files import add_job, unfinished, write_arrays
from factorllm.exporting.watch import INTO_EXPERTS, OUT_OF_EXPERTS, ROUTER, run_watched
from factorllm.runs.finite import is_finite
from factorllm.runs.progress import meter
from factorllm.text.calibration import hold_out, public_name, say_notes
from factorllm.text.parts import open_text, sequences_of

TOKENS = 65_536
"""Tokens of the text that are run, by default."""

_LEAST = 1e-8
"""Share of the mean below which no channel counts: a block whose weights are all 0 would be written as zeros."""


@dataclass(frozen=True)
class Importance:
    """What was seen of the inputs of each matrix in a layer, by the tensor's name in GGUF files.

    Attributes:
        sums: the sum of x^2 over tokens, (n, d), fp64; a row for each expert, or one row.
        counts: how many tokens those are, (n,), fp64.
        unrouted: (n, d), fp64, for the experts' matrices: the mean of x^2 over all of the layer's tokens, for an
            expert that none of them was routed to; other rows are 0.
        text: the text's name, to be published.
        shape: sequences, and tokens in each.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    unrouted: dict[str, Tensor]
    text: str
    shape: tuple[int, int]

    def weights(self, name: str) -> np.ndarray | None:
        """What ggml's quantiser is given for a tensor: (n, d), fp32, positive, of mean 1; None where nothing is known.

        An expert that ran for no token has what all tokens of its layer would have put into it. Where nothing ever
        comes in, all channels count alike.
        """
        if name not in self.sums:
            return None
        counts = self.counts[name][:, None]
        means = self.sums[name] / counts.clamp(min=1)
        if name in self.unrouted:
            means = torch.where(counts > 0, means, self.unrouted[name])
        means = torch.where(means.mean(1, keepdim=True) > 0, means, torch.ones_like(means))
        relative = means / means.mean(1, keepdim=True)
        return relative.clamp(min=_LEAST).float().numpy()

    @property
    def never_run(self) -> int:
        """Experts, over all layers, that no token was routed to."""
        return sum(int((self.counts[name] == 0).sum()) for name in self.counts if name.endswith(OUT_OF_EXPERTS))


def read_importance(checkpoint: Checkpoint, text: str, tokens: int, console: Console | None = None) -> Importance:
    """Run a model on a part of a text that `factorize` does not hold out.

    Args:
        text: a .txt/.jsonl/.json/.parquet file or a `datasets` id.
        tokens: how many; where the text has fewer, all.

    Raises:
        FactorLLMError: when the text cannot be read or is too short, or the model computes NaN or infinity on it.
    """
    console = console or Console(quiet=True)
    model, taken = open_inputs(checkpoint, text, tokens, console)
    seen = _Sums()
    with meter(console, "finding what counts", len(taken)) as bar:
        run_watched(model, checkpoint, taken, seen, tick=bar.advance)
    if not all(is_finite(each) for each in seen.sums.values()):
        raise FactorLLMError(
            f"{checkpoint.name} computes NaN or infinity on {text}, so nothing can be said of what counts in it; "
            "export without --text"
        )
    return Importance(seen.sums, seen.counts, seen.unrouted(), public_name(text), tuple(taken.shape))


def open_inputs(checkpoint: Checkpoint, text: str, tokens: int, console: Console) -> tuple[PreTrainedModel, Tensor]:
    """A model in transformers, and what it is run on: (sequences, length), int64.

    Args:
        text: of which no part is taken that `factorize` holds out.
        tokens: how many; where the text has fewer, all.

    Raises:
        FactorLLMError: when the text cannot be read or is too short.
    """
    settings = checkpoint.settings().model_copy(update={"device": "auto"}).resolve(checkpoint.config)
    parts = open_text(text, checkpoint.tokenizer, settings)
    hold_out(parts, settings)
    taken = parts.take(sequences_of(tokens, settings.length))
    say_notes(parts, console)
    if not len(taken):
        raise FactorLLMError(
            f"the text is too short: beside the {settings.held_out_tokens} tokens that are held out it has not one "
            f"sequence of {settings.length}; give more text, or leave out --text"
        )
    return checkpoint.load(settings.compute_dtype, settings.torch_device), taken


class WeighOnce:
    """`read_importance` of one model and text, of which files of several types are written."""

    def __init__(self) -> None:
        self._found: Importance | None = None

    def __call__(self, checkpoint: Checkpoint, text: str, tokens: int, console: Console) -> Importance:
        if self._found is None:
            self._found = read_importance(checkpoint, text, tokens, console)
        return self._found


class _Sums:
    """Of squares, over the tokens that were seen."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._idle: dict[str, Tensor] = {}

    def see(self, name: str, row: int, rows: int, inputs: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows, inputs.shape[-1], dtype=torch.float64)
            self.counts[name] = torch.zeros(rows, dtype=torch.float64)
        self.sums[name][row] += _squares(inputs)
        self.counts[name][row] += inputs[..., 0].numel()

    def see_idle(self, prefix: str, expert: int, experts: int, inner: Callable[[], Tensor]) -> None:
        if not self.counts[prefix + OUT_OF_EXPERTS][expert]:  # it may never run
            squares = _squares(inner())
            self._idle.setdefault(prefix, torch.zeros(experts, len(squares), dtype=torch.float64))[expert] += squares

    def unrouted(self) -> dict[str, Tensor]:
        """`unrouted` of `Importance`."""
        found = {}
        for prefix in (name.removesuffix(ROUTER) for name in self.sums if name.endswith(ROUTER)):
            out, into = prefix + OUT_OF_EXPERTS, prefix + ROUTER
            idle, tokens = self.counts[out][:, None] == 0, self.counts[into]
            for name in [name for name in INTO_EXPERTS if prefix + name in self.sums]:
                found[prefix + name] = torch.where(idle, self.sums[into] / tokens, 0.0)
            spare = self._idle.get(prefix, torch.zeros_like(self.sums[out]))
            found[out] = torch.where(idle, spare / tokens, 0.0)
        return found


def _squares(inputs: Tensor) -> Tensor:
    """The sum of squares over all but the last dimension, fp64, on the CPU."""
    return inputs.flatten(0, -2).float().square().sum(0).double().cpu()


class _ImportanceWriter(gguf.GGUFWriter):
    """A GGUF file that is no model."""

    def add_architecture(self) -> None:
        """It has none."""


def write_importance(importance: Importance, out: Path, job: dict[str, Any], when_full: str) -> None:
    """Write an importance-matrix file as llama.cpp's own tool does, for llama-quantize.

    An expert that ran for no token has sums and counts of 0 there, which llama-quantize takes for all alike.

    Args:
        job: what the file says of its making.
        when_full: what to do when the disk is full.

    Raises:
        FactorLLMError: when the file cannot be written.
    """
    partial = unfinished(out)
    writer = _ImportanceWriter(partial, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [importance.text])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, importance.shape[0])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, importance.shape[1])
    add_job(writer, job)
    write_arrays(writer, _stored(importance), partial, out, when_full)


def _stored(importance: Importance) -> dict[str, np.ndarray]:
    tensors = {}
    for name in sorted(importance.sums):
        tensors[f"{name}.in_sum2"] = importance.sums[name].float().numpy()
        tensors[f"{name}.counts"] = importance.counts[name][:, None].float().numpy()
    return tensors
