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
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.files import add_job, publishing, unfinished
from factorllm.exporting.tensors import ATTENTION
from factorllm.hosts import Host
from factorllm.runs.finite import is_finite
from factorllm.runs.progress import meter
from factorllm.text.calibration import hold_out, public_name, say_notes
from factorllm.text.parts import open_text, sequences_of

TOKENS = 65_536
"""Tokens of the text that are run, by default."""

_AT_ONCE = 2048  # tokens
_LEAST = 1e-8
"""Share of the mean below which no channel counts: a block whose weights are all 0 would be written as zeros."""

_ROUTER = "ffn_gate_inp.weight"
_INTO_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_OUT_OF_EXPERTS = "ffn_down_exps.weight"
_NAME = "factorllm_importance"


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
        return sum(int((self.counts[name] == 0).sum()) for name in self.counts if name.endswith(_OUT_OF_EXPERTS))


def read_importance(checkpoint: Checkpoint, text: str, tokens: int, console: Console | None = None) -> Importance:
    """Run a model on a part of a text that `factorize` does not hold out.

    Args:
        text: a .txt/.jsonl/.json/.parquet file or a `datasets` id.
        tokens: how many; where the text has fewer, all.

    Raises:
        FactorLLMError: when the text cannot be read or is too short, or the model computes NaN or infinity on it.
    """
    console = console or Console(quiet=True)
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
    model = checkpoint.load(settings.compute_dtype, settings.torch_device)
    with meter(console, "finding what counts", len(taken)) as bar:
        sums, counts, unrouted = collect(model, checkpoint, taken, bar.advance)
    if not all(is_finite(each) for each in sums.values()):
        raise FactorLLMError(
            f"{checkpoint.name} computes NaN or infinity on {text}, so nothing can be said of what counts in it; "
            "export without --text"
        )
    return Importance(sums, counts, unrouted, public_name(text), tuple(taken.shape))


@torch.inference_mode()
def collect(
    model: PreTrainedModel, checkpoint: Checkpoint, tokens: Tensor, tick: Callable[[int], None] = lambda sequences: None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """`sums`, `counts` and `unrouted` of `Importance`.

    Args:
        model: the checkpoint in transformers; it is left with hooks and a way of its own to compute experts.
        tokens: (sequences, length), int64.
        tick: called with the number of sequences after each batch.
    """
    seen = _Seen(model, checkpoint)
    for rows in tokens.split(max(_AT_ONCE // tokens.shape[1], 1)):
        model.model(rows.to(model.device), use_cache=False)  # without the head, which is not asked
        tick(len(rows))
    return seen.sums, seen.counts, seen.unrouted()


class _Seen:
    """Sums over the tokens that a model has been run on since."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}
        self._prefixes: dict[int, str] = {}
        for index, layer in enumerate(model.model.layers):
            for name, module in _linears(layer, checkpoint.host).items():
                module.register_forward_pre_hook(self._hook(f"blk.{index}.{name}"))
            for module in layer.modules():
                if type(module).__name__.endswith("Experts"):
                    self._prefixes[id(module)] = f"blk.{index}."
                elif type(module).__name__.endswith("Router"):
                    module.top_k = checkpoint.config.num_experts_per_tok  # of `with_top_k`
        if self._prefixes:
            ALL_EXPERTS_FUNCTIONS.register(_NAME, self._experts)
            model.set_experts_implementation(_NAME)

    def unrouted(self) -> dict[str, Tensor]:
        """`unrouted` of `Importance`."""
        found = {}
        for prefix in self._prefixes.values():
            into, idle = prefix + _ROUTER, self.counts[prefix + _OUT_OF_EXPERTS][:, None] == 0
            tokens = self.counts[into]
            for name in _INTO_EXPERTS:
                found[prefix + name] = torch.where(idle, self.sums[into] / tokens, 0.0)
            found[prefix + _OUT_OF_EXPERTS] = torch.where(idle, self._spare[prefix] / tokens, 0.0)
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._add(name, 0, 1, inputs[0])

        return see

    def _add(self, name: str, row: int, rows: int, inputs: Tensor) -> None:
        """Count inputs (..., d) for one row of a tensor's sums."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows, inputs.shape[-1], dtype=torch.float64)
            self.counts[name] = torch.zeros(rows, dtype=torch.float64)
        self.sums[name][row] += _squares(inputs)
        self.counts[name][row] += inputs[..., 0].numel()

    def _experts(self, experts: nn.Module, hidden: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        """The experts of a layer, one by one, as transformers computes them.

        Args:
            hidden: (tokens, d).
            picks: (tokens, k), int64.
            gates: (tokens, k).
        """
        prefix, count = self._prefixes[id(experts)], len(experts.down_proj)
        self._add(prefix + _ROUTER, 0, 1, hidden)
        spare = self._spare.setdefault(prefix, torch.zeros(count, experts.down_proj.shape[-1], dtype=torch.float64))
        out = torch.zeros_like(hidden)
        for expert in range(count):
            rows, place = torch.where(picks == expert)
            inner = _inner(experts, expert, hidden[rows])
            for name in _INTO_EXPERTS:
                self._add(prefix + name, expert, count, hidden[rows])
            self._add(prefix + _OUT_OF_EXPERTS, expert, count, inner)
            if not self.counts[prefix + _OUT_OF_EXPERTS][expert]:  # it may never run
                spare[expert] += _squares(_inner(experts, expert, hidden))
            made = linear(inner, experts.down_proj[expert]) * gates[rows, place, None]
            out.index_add_(0, rows, made.to(out.dtype))
        return out


def _inner(experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """What goes into an expert's down projection: (n, d) -> (n, width)."""
    gate, up = linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _squares(inputs: Tensor) -> Tensor:
    """The sum of squares over all but the last dimension, fp64, on the CPU."""
    return inputs.flatten(0, -2).float().square().sum(0).double().cpu()


def _linears(layer: nn.Module, host: Host) -> dict[str, nn.Linear]:
    """The linear maps of a layer by their names in GGUF files. The routed experts are none: they are one tensor."""
    sources = {f"{target}.weight": source for source, target in ATTENTION.items()}
    sources |= {target: stored.name.removesuffix(".weight") for target, stored in host.gguf_ffn.items()}
    modules = dict(layer.named_modules())
    found = {target: modules.get(source) for target, source in sources.items()}
    return {target: module for target, module in found.items() if isinstance(module, nn.Linear)}


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
    tensors = _stored(importance)
    for name, data in tensors.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes)
    with publishing(writer, partial, out, when_full):
        for data in tensors.values():
            writer.write_tensor_data(data)


def _stored(importance: Importance) -> dict[str, np.ndarray]:
    tensors = {}
    for name in sorted(importance.sums):
        tensors[f"{name}.in_sum2"] = importance.sums[name].float().numpy()
        tensors[f"{name}.counts"] = importance.counts[name][:, None].float().numpy()
    return tensors
