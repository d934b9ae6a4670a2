"""What goes into each matrix of a model's layers while it is run on a text, by the tensors' names in GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from factorllm.dense.modules import decoder_layers, expert_hidden, experts_of
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.tensors import ATTENTION

ROUTER = "ffn_gate_inp.weight"
INTO_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
OUT_OF_EXPERTS = "ffn_down_exps.weight"

_AT_ONCE = 2048  # tokens
_NAME = "factorllm_watched"


class Watcher(Protocol):
    """Who is shown inputs."""

    def see(self, name: str, row: int, rows: int, inputs: Tensor) -> None:
        """Inputs (..., d) of one of the `rows` matrices of a tensor, in the order of its columns in the file."""

    def see_idle(self, prefix: str, expert: int, experts: int, inner: Callable[[], Tensor]) -> None:
        """What would go into an expert's down projection if all tokens ran it: (tokens, width), computed when called.

        Args:
            prefix: of the names of the layer's tensors.
        """


@torch.inference_mode()
def run_watched(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    tokens: Tensor,
    watcher: Watcher,
    layers: Iterable[int] | None = None,
    tick: Callable[[int], None] = lambda sequences: None,
) -> None:
    """Run a model on a text, and show what goes into its matrices.

    Args:
        model: the checkpoint in transformers.
        tokens: (sequences, length), int64.
        layers: those that are watched; None for all.
        tick: called with the number of sequences after each batch.
    """
    with _watching(model, checkpoint, watcher, range(len(decoder_layers(model))) if layers is None else layers):
        for rows in tokens.split(max(_AT_ONCE // tokens.shape[1], 1)):
            model.get_decoder()(rows.to(model.device), use_cache=False)  # without the head, which is not asked
            tick(len(rows))


@contextmanager
def _watching(
    model: PreTrainedModel, checkpoint: Checkpoint, watcher: Watcher, layers: Iterable[int]
) -> Iterator[None]:
    hooks, prefixes = [], {}
    for index, layer in enumerate(decoder_layers(model)):
        for module in experts_of(layer):
            prefixes[id(module)] = f"blk.{index}." if index in layers else None
        for module in layer.modules():
            if type(module).__name__.endswith("Router"):
                module.top_k = checkpoint.host.shape(checkpoint.config).top_k  # of `with_top_k`
        if index in layers:
            for name, module in linears(layer, index, checkpoint).items():
                columns = checkpoint.form.gguf_columns(name, checkpoint.config)
                hooks.append(module.register_forward_pre_hook(_hook(watcher, f"blk.{index}.{name}", columns)))
    if prefixes:
        ffn = checkpoint.host.gguf_ffn_of(checkpoint.config)
        experts = _Experts(prefixes, [name for name in INTO_EXPERTS if name in ffn], watcher)
        ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
        model.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(watcher: Watcher, name: str, columns: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        watcher.see(name, 0, 1, inputs[0] if columns is None else inputs[0][..., columns])

    return see


class _Experts:
    """The experts of a layer, one by one, as transformers computes them.

    Args:
        prefixes: of the layer's tensors, by the module's id; None where nobody watches.
        into: those of `INTO_EXPERTS` that there are.
    """

    def __init__(self, prefixes: dict[int, str | None], into: list[str], watcher: Watcher):
        self._prefixes, self._into, self._watcher = prefixes, into, watcher

    def __call__(self, experts: nn.Module, hidden: Tensor, picks: Tensor, gates: Tensor) -> Tensor:
        """What the layer's experts give.

        Args:
            hidden: (tokens, d).
            picks: (tokens, k), int64.
            gates: (tokens, k).
        """
        prefix, count = self._prefixes[id(experts)], len(experts.down_proj)
        if prefix:
            self._watcher.see(prefix + ROUTER, 0, 1, hidden)
        out = torch.zeros_like(hidden)
        for expert in range(count):
            rows, place = torch.where(picks == expert)
            own = hidden[rows]
            inner = expert_hidden(experts, expert, own)
            if prefix:
                for name in self._into:
                    self._watcher.see(prefix + name, expert, count, own)
                self._watcher.see(prefix + OUT_OF_EXPERTS, expert, count, inner)
                self._watcher.see_idle(prefix, expert, count, partial(expert_hidden, experts, expert, hidden))
            made = linear(inner, experts.down_proj[expert]) * gates[rows, place, None]
            out.index_add_(0, rows, made.to(out.dtype))
        return out


def linears(layer: nn.Module, index: int, checkpoint: Checkpoint) -> dict[str, nn.Linear]:
    """The linear maps of a layer by their names in GGUF files. The routed experts are none: they are one tensor."""
    sources = {f"{target}.weight": source for source, target in (ATTENTION | checkpoint.form.gguf_names).items()}
    ffn = checkpoint.host.gguf_ffn_at(index, checkpoint.config)
    sources |= {target: stored.name.removesuffix(".weight") for target, stored in ffn.items()}
    modules = dict(layer.named_modules())
    found = {target: modules.get(source) for target, source in sources.items()}
    return {target: module for target, module in found.items() if isinstance(module, nn.Linear)}
