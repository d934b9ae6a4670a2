"""What is exported: a student's folder, or a dense model as folder, GGUF file or hub id, behind one face."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense import local_path, open_model
from factorllm.dense.families import is_dense
from factorllm.dense.model import check_finite
from factorllm.dense.pretrained import read_generation_config
from factorllm.dense.safetensors import TensorFolder, licence_of_card, open_folder, read_tokenizer, ties_embeddings
from factorllm.dense.wrappers import Wrapper
from factorllm.errors import FactorLLMError, refusing
from factorllm.hosts import HOSTS, Host, MoeHost
from factorllm.hosts.base import GGUFForm
from factorllm.runs.given import name_of
from factorllm.runs.output import PROVENANCE
from factorllm.runs.settings import Settings
from factorllm.student.layout import check_layout
from factorllm.student.read import load_student, read_provenance


class Layout(Protocol):
    """What a GGUF file is laid out by: its tensors may be without data."""

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str | None: ...
    @property
    def config(self) -> PreTrainedConfig: ...
    @property
    def host(self) -> Host: ...
    @property
    def names(self) -> frozenset[str]: ...
    @property
    def read(self) -> Callable[[str], torch.Tensor]: ...
    @property
    def wrapper(self) -> Wrapper | None: ...
    @property
    def form(self) -> GGUFForm: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be written as GGUF.

    Attributes:
        host: the architecture that it is in.
        names: transformers names of its tensors.
        read: a tensor by its name.
        shape: the shape of a tensor by its name, without reading it.
        load: the whole model in transformers, in a dtype and on a device.
        generation: its generation config, or the one that follows from its config.
        settings: reads how it was made, where factorllm made it; they say which part of a text is held out.
        wrapper: what is round it, where it is the text model of a vision-language model.
        overlaps: whether its experts share neurons.
    """

    name: str
    config: PreTrainedConfig
    host: Host
    names: frozenset[str]
    read: Callable[[str], torch.Tensor]
    shape: Callable[[str], tuple[int, ...]]
    tokenizer: PreTrainedTokenizerBase
    licence: str | None
    generation: GenerationConfig
    load: Callable[[torch.dtype, torch.device], PreTrainedModel]
    settings: Callable[[], Settings]
    wrapper: Wrapper | None = None
    overlaps: bool = False

    @property
    def form(self) -> GGUFForm:
        """What is so of its GGUF file beside the FFNs."""
        return self.host.gguf_form(self.config)

    def _free_top_k(self) -> str:
        """What to do for a top-k that can be chosen later."""
        families = set(self.host.families)
        moe = [host for host in HOSTS.values() if isinstance(host, MoeHost)]
        free = [host.name for host in moe if host.gates.top_k_is_free and families.intersection(host.families)]
        if not free:
            return "no host of its family leaves it free: factorize with the top-k that is wanted"
        return f"factorize with --host {' or '.join(free)} for one that can be chosen later, where they hold its family"

    def with_top_k(self, top_k: int) -> Checkpoint:
        """The same weights, with another number of experts that run for a token.

        Raises:
            FactorLLMError: when the host's gate weights would not stay the same, or there are not so many experts, or
                experts overlap.
        """
        if self.overlaps:
            raise FactorLLMError(
                "top-k is fixed at 1: its experts overlap, and neurons of two would count twice; with a recipe such as "
                f"S2A2E8, {self._free_top_k()}"
            )
        if self.host.gates is None:
            raise FactorLLMError(f"{self.name} has no experts, so there is no top-k to choose; leave it out")
        if not self.host.gates.top_k_is_free:
            raise FactorLLMError(
                f"top-k of {self.config.model_type} is fixed: its gate weights depend on it; {self._free_top_k()}"
            )
        experts = self.host.shape(self.config).experts
        if not 1 <= top_k <= experts:
            raise FactorLLMError(f"top-k {top_k} is not between 1 and {experts}, the number of experts")
        config = copy.deepcopy(self.config)
        config.num_experts_per_tok = top_k
        return replace(self, config=config)


def open_checkpoint(model: str) -> Checkpoint:
    """Open a student, or a dense or pruned model.

    Raises:
        FactorLLMError: when it is not there, damaged, or of an architecture that is neither host nor dense family.
    """
    folder = local_path(model)
    if (folder / "config.json").is_file():
        config, wrapper, tensors = open_folder(folder, model)
        if not is_dense(config) and config.model_type in HOSTS:
            return replace(_open_student(folder, model, config, tensors), wrapper=wrapper)
    source = open_model(model)
    name = name_of(Path(source.label).resolve()).removesuffix(".gguf")
    return Checkpoint(
        name=name,
        config=source.config,
        host=HOSTS["dense"],
        names=frozenset(source.names()),
        read=source.tensor,
        shape=source.shape,
        tokenizer=source.tokenizer(),
        licence=source.licence,
        generation=source.generation_config(),
        load=source.load_model,
        settings=partial(_settings, folder),
        wrapper=source.wrapper,
    )


def refuse_unwritable(checkpoint: Checkpoint, label: str) -> None:
    """Refuse what llama.cpp would compute otherwise.

    Args:
        label: what the user calls it.

    Raises:
        FactorLLMError: saying why, and what to do instead.
    """
    if reason := checkpoint.host.reason_against_gguf(checkpoint.config):
        other = ", or factorize anew with another --host of its family, if `factorllm hosts` lists one"
        raise FactorLLMError(
            f"{label} cannot be exported: {reason}, so its outputs would be wrong; serve it with transformers or vLLM"
            + (other if checkpoint.host.gates else "")
        )


def _open_student(folder: Path, label: str, config: PreTrainedConfig, tensors: TensorFolder) -> Checkpoint:
    host = HOSTS[config.model_type]
    with refusing(f"{label}/config.json", "make or fetch the checkpoint again"):
        config.tie_word_embeddings = ties_embeddings(config, tensors)
        check_layout(tensors, config, host)
    made = _made(folder)
    return Checkpoint(
        name=name_of(folder.resolve()),
        config=config,
        host=host,
        names=frozenset(tensors.names()),
        read=lambda name: check_finite(tensors.read(name), name, label),
        shape=tensors.shape,
        tokenizer=read_tokenizer(folder, label),
        licence=licence_of_card(folder / "README.md"),
        generation=read_generation_config(folder, config),
        load=partial(load_student, folder),
        settings=partial(_settings, folder),
        # A model of another origin is taken not to have experts that overlap.
        overlaps=bool(made) and made["recipe"].get("overlapping") is not None,
    )


def _made(folder: Path) -> dict:
    """What a checkpoint of ours says of itself; nothing for a model of another origin."""
    return read_provenance(folder) if (folder / PROVENANCE).is_file() else {}


def _settings(folder: Path) -> Settings:
    made = _made(folder)
    return Settings(**made["settings"]) if made else Settings()
