"""`X^T X` of what goes into each matrix, for rounding that makes errors good; a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.importance import open_inputs
from factorllm.exporting.watch import run_watched
from factorllm.runs.memory import available_memory
from factorllm.runs.progress import meter

_AT_MOST = 1 / 4
"""Share of the memory that is free which the sums of some layers may take together."""

_SAME_INPUTS = {
    "attn_k": "attn_q",
    "attn_v": "attn_q",
    "ffn_gate": "ffn_up",
    "ffn_gate_exps": "ffn_up_exps",
    "ffn_gate_shexp": "ffn_up_shexp",
}
"""Tensors that read what another one reads, which is summed up once. Some gates are in the tensor of their up."""


_ORDERED_BY = {
    f"ffn_{part}{which}": f"ffn_down{which}" for part in ("gate", "up", "down") for which in ("", "_exps", "_shexp")
}
"""Matrices of an FFN, and the one whose inputs are its neurons."""


class Grams:
    """Sums over a text for each matrix of a model's layers.

    The model is run on the text again for every few layers, so that any model's sums fit in memory.

    Args:
        text: as for `read_importance`.
        tokens: how many tokens of it are run.
    """

    def __init__(self, checkpoint: Checkpoint, text: str, tokens: int, console: Console):
        self._checkpoint, self._console = checkpoint, console
        self._model, self._tokens = open_inputs(checkpoint, text, tokens, console)
        self._layers = range(0)
        self._sums: dict[str, Tensor] = {}
        self._orders: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """`X^T X` of a tensor's inputs, those of a down projection in the order of `in_order`.

        Returns:
            (n, d, d), fp32, one for each of its matrices; None for what no layer has.
        """
        gram = self._sum(name)
        if gram is None or (order := self._neuron_order(name)) is None or not _is_down(name):
            return gram
        return torch.stack([own[neurons][:, neurons] for own, neurons in zip(gram, order, strict=True)])

    def adapter_in_order(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What an adapter adds to a tensor, A (r, d) and B (o, r), with its neurons in the order of `in_order`."""
        return (self.in_order(name, a), b) if _is_down(name) else (a, self.in_order(name, b))

    def in_order(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of an FFN, (..., rows, d), with each FFN's neurons the most active first; others as they are.

        In whatever order, an FFN computes the same. Where those that count most are rounded first, their errors are
        made good by all the others, as with `act-order` in GPTQ's own code; but no engine needs to know of it.
        """
        order = self._neuron_order(name)
        if order is None:
            return tensor
        dim, matrices = (-1 if _is_down(name) else -2), tensor.reshape(-1, *tensor.shape[-2:])
        # A gate that is in the tensor of its up is ordered like it.
        parts = range(0, matrices.shape[dim], order.shape[1])
        order = torch.cat([order + start for start in parts], dim=1)
        ordered = [own.index_select(dim, neurons) for own, neurons in zip(matrices, order, strict=True)]
        return torch.stack(ordered).view_as(tensor)

    def _neuron_order(self, name: str) -> Tensor | None:
        """(n, width), int64; None for what is no matrix of an FFN."""
        start, leaf = _split(name)
        if leaf not in _ORDERED_BY:
            return None
        down = f"{start}.{_ORDERED_BY[leaf]}.weight"
        # Kept: a file and its adapters must have one order, and its adapters ask before it for all layers.
        if down not in self._orders and (gram := self._sum(down)) is not None:
            self._orders[down] = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        return self._orders.get(down)

    def _sum(self, name: str) -> Tensor | None:
        """What was seen of a tensor's inputs."""
        if not name.startswith("blk.") or not name.endswith(".weight"):
            return None
        layer = int(name.split(".")[1])
        if layer not in self._layers:
            self._collect(layer)
        return self._sums.get(_read_by(name))

    def _collect(self, first: int) -> None:
        """Sum up for as many layers as fit, or for one."""
        self._sums = {}
        count = self._checkpoint.config.num_hidden_layers
        size = 4 * (2 * self._checkpoint.config.hidden_size**2 + self._inner_width() ** 2)
        fitting = int(_AT_MOST * available_memory()) // size
        self._layers = range(first, min(first + max(fitting, 1), count))
        with meter(self._console, f"summing up layers {first + 1} to {self._layers.stop}", len(self._tokens)) as bar:
            run_watched(self._model, self._checkpoint, self._tokens, self, self._layers, bar.advance)

    def _inner_width(self) -> int:
        return self._checkpoint.host.shape(self._checkpoint.config).kept_width

    def see(self, name: str, row: int, rows: int, inputs: Tensor) -> None:
        if _read_by(name) != name:
            return
        flat = inputs.flatten(0, -2).float()
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows, flat.shape[1], flat.shape[1])
        self._sums[name][row] += (flat.T @ flat).cpu()

    def see_idle(self, prefix: str, expert: int, experts: int, inner: Callable[[], Tensor]) -> None:
        """Experts that never ran are rounded as if their inputs had nothing in common."""


def _read_by(name: str) -> str:
    """The tensor whose inputs are summed up for one: `blk.3.attn_k.weight` -> `blk.3.attn_q.weight`."""
    start, leaf = _split(name)
    return f"{start}.{_SAME_INPUTS.get(leaf, leaf)}.weight"


def _is_down(name: str) -> bool:
    return _split(name)[1].startswith("ffn_down")


def _split(name: str) -> tuple[str, str]:
    """`blk.3.attn_k.weight` -> `blk.3`, `attn_k`."""
    start, _, leaf = name.removesuffix(".weight").rpartition(".")
    return start, leaf
