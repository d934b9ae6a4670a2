"""Adapters beside a student's weights: an ordinary LoRA for each kind of text, which peft reads, and the intuition that
says which kinds a text is of. A mixture of kinds runs `W x + sum_k p_k B_k A_k x`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, refusing, refusing_path
from factorllm.runs.workspace import write_shard
from factorllm.text.intuition import FILE, Intuition

ADAPTERS = "adapters"
"""The folder of adapters in a student's, one folder for each kind by its number."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_OTHER_LORA = (
    "use_rslora", "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "layer_replication",
    "alora_invocation_tokens",
)  # fmt: skip
"""Keys of peft's config by which an adapter adds something else than `lora_alpha / r` times `B A`."""

_PREFIX = "base_model.model."  # of a module's name in peft's files
_AGAIN = "it is damaged: heal with --train mor1e again"


class LowRank(NamedTuple):
    """What an adapter adds to a matrix W (o, d): `B A`."""

    a: Tensor
    """(r, d)"""
    b: Tensor
    """(o, r)"""


Adapter = dict[str, LowRank]
"""By the names of the modules in transformers."""


def adapter_folders(student: Path) -> list[Path]:
    """The adapters of a student, in the order of their kinds; none of most students.

    Raises:
        FactorLLMError: when one is missing among them; for what no path can be.
    """
    with refusing_path(student):
        count = sum(path.is_dir() for path in (student / ADAPTERS).glob("*"))
    folders = [student / ADAPTERS / str(kind) for kind in range(count)]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise FactorLLMError(f"{missing[0]} is missing among the adapters of {student}; heal with --train mor1e again")
    return folders


def adapter_files(student: Path) -> list[Path]:
    """All files that decide what a student's adapters add to it; none of most students."""
    folders = adapter_folders(student)
    return [folder / name for folder in folders for name in (CONFIG, WEIGHTS)] + [student / FILE] * bool(folders)


def refuse_adapters(student: Path, what: str) -> None:
    """Refuse a student with adapters where they would be left out.

    Args:
        what: cannot be done, and what to do instead.

    Raises:
        FactorLLMError: when it has some.
    """
    if adapter_folders(student):
        raise FactorLLMError(f"{student} holds an adapter for each kind of text, and {what}")


def write_adapters(student: Path, adapters: list[Adapter], config: Any, intuition: Intuition) -> None:
    """Write them as peft does, kind by kind.

    Args:
        config: peft's, of each of them.
    """
    for kind, adapter in enumerate(adapters):
        folder = student / ADAPTERS / str(kind)
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        pairs = ((f"{_PREFIX}{name}.lora_{side}.weight", pair) for name, found in adapter.items()
                 for side, pair in zip("AB", found, strict=True))  # fmt: skip
        write_shard(folder / WEIGHTS, dict(pairs))
    intuition.save(student)


def read_adapter(folder: Path) -> Adapter:
    """What peft would add, its scale among B.

    Raises:
        FactorLLMError: when the folder is damaged, or holds another kind of adapter than an ordinary LoRA.
    """
    with refusing(folder, _AGAIN):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        scale = _scale(config)
        names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
        if len(tensors) != 2 * len(names):
            raise ValueError("it is no ordinary LoRA")
        pairs = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    return {name.removeprefix(_PREFIX): LowRank(a, scale * b) for name, (a, b) in pairs.items()}


def _scale(config: dict[str, Any]) -> float:
    """What `B A` is multiplied with, in all modules alike: fused ones may have more rank, and as much more alpha.

    Raises:
        ValueError: for a config of peft's by which an adapter adds something else.
    """
    alpha, rank = config["lora_alpha"], config["r"]
    alphas, ranks = (config.get(f"{kind}_pattern") or {} for kind in ("alpha", "rank"))
    alike = all(
        alphas.get(name, alpha) * rank == alpha * ranks.get(name, rank) for name in alphas.keys() | ranks.keys()
    )
    if config["peft_type"] != "LORA" or not alike or any(config.get(key) for key in _OTHER_LORA):
        raise ValueError("it is no ordinary LoRA")
    return alpha / rank


class Mixture:
    """Probabilities over kinds for each token of the sequences that a model is being run on.

    A sequence is packed of documents, each of which ends with the end token and has kinds of its own.

    Attributes:
        probabilities: (sequences, length, K) of the last sequences; of the tokens that are generated after a prompt,
            its last one's.
    """

    def __init__(self, intuition: Intuition, tokenizer: PreTrainedTokenizerBase):
        self.intuition, self._tokenizer = intuition, tokenizer
        self.probabilities = torch.empty(0, 0, intuition.kinds)

    def watch(self, model: PreTrainedModel) -> None:
        """Look at all that a model is run on."""
        model.get_decoder().register_forward_pre_hook(self._look, with_kwargs=True)

    def of(self, inputs: Tensor) -> Tensor:
        """(..., K), for a layer's input (..., d), whose rows are the sequences' tokens."""
        return self.probabilities.reshape(*inputs.shape[:-1], -1)

    def read(self, tokens: Tensor) -> Tensor:
        """(sequences, length) -> (sequences, length, K)."""
        found = torch.empty(*tokens.shape, self.intuition.kinds)
        for row, place in zip(tokens.tolist(), found, strict=True):
            for span in spans(row, self._tokenizer.eos_token_id):
                text = self._tokenizer.decode(row[span], skip_special_tokens=True)
                place[span] = torch.from_numpy(self.intuition.probabilities(text)).float()
        return found.to(tokens.device)

    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        tokens = inputs[0] if inputs else named["input_ids"]
        cache = named.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            self.probabilities = self.probabilities[:, -1:].expand(-1, tokens.shape[1], -1)
        else:
            self.probabilities = self.read(tokens)


def spans(row: list[int], end: int) -> Iterator[slice]:
    """Where the documents of a sequence are, end tokens with them."""
    start = 0
    for stop in [place + 1 for place, token in enumerate(row) if token == end] + [len(row)]:
        if stop > start:
            yield slice(start, stop)
        start = stop


def mix_adapters(model: PreTrainedModel, student: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a loaded student run with its adapters, mixed as the intuition says of each document.

    Raises:
        FactorLLMError: when an adapter is damaged or does not fit.
    """
    adapters = [read_adapter(folder) for folder in adapter_folders(student)]
    mixture = Mixture(Intuition.load(student), tokenizer)
    with refusing(student / ADAPTERS, "it is of another student: heal with --train mor1e again"):
        if mixture.intuition.kinds != len(adapters) or any(each.keys() != adapters[0].keys() for each in adapters):
            raise ValueError(f"{len(adapters)} adapters are not of the {mixture.intuition.kinds} kinds")
        for name in adapters[0]:
            module = model.get_submodule(name)
            pairs = [adapter[name] for adapter in adapters]
            if any((len(pair.b), pair.a.shape[1]) != tuple(module.weight.shape) for pair in pairs):
                raise ValueError(f"{name} has another shape")
            module.register_forward_hook(_Added(pairs, mixture, module.weight))
    mixture.watch(model)


class _Added:
    """A hook that adds `sum_k p_k B_k A_k x` to what a linear layer gives."""

    def __init__(self, pairs: list[LowRank], mixture: Mixture, like: Tensor):
        self._a = torch.cat([pair.a for pair in pairs]).to(like)
        self._b = torch.cat([pair.b for pair in pairs], dim=1).to(like)
        self._rank, self._mixture = len(pairs[0].a), mixture

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        weights = self._mixture.of(inputs[0]).to(self._a).repeat_interleave(self._rank, dim=-1)
        return output + (inputs[0] @ self._a.T * weights) @ self._b.T
