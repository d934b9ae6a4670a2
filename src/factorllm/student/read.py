"""Reading back a finished checkpoint: what it says of itself, and its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from factorllm.convert.partition import Partition, partition_from_order
from factorllm.dense.families import ffn_layers
from factorllm.dense.safetensors import load_language_model, open_folder, read_tokenizer
from factorllm.errors import RENAME, FactorLLMError, check_utf8, refusing, refusing_path
from factorllm.hosts import host_of
from factorllm.recipe import Shape
from factorllm.runs.output import PROVENANCE, refuse_folder_of_checkpoints, trimmed_from, workspace_folder
from factorllm.student.adapters import adapter_folders, mix_adapters
from factorllm.student.provenance import check_provenance
from factorllm.text.calibration import text_identity

Read = TypeVar("Read")

PARTITION_FILE = "factorllm.partition.json"
"""For each FFN, which neuron of the dense one each of the student's is: shared ones first, then expert by expert."""


def read_provenance(folder: Path) -> dict:
    """The content of `factorllm.json`.

    Raises:
        FactorLLMError: when the folder is not a finished checkpoint of factorllm.
    """
    path = folder / PROVENANCE
    with refusing_path(folder):
        there, partial = path.exists(), workspace_folder(folder)
    check_utf8(folder, RENAME)
    refuse_folder_of_checkpoints(folder)
    if not there:
        raise FactorLLMError(_what_it_is(folder, partial))
    with refusing(path, "it is damaged, or of another version of factorllm: make the checkpoint again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        check_provenance(content)
    return content


def refuse_text_of_kinds(label: Path | str, made: dict, text: str | None) -> None:
    """Refuse the text among whose documents the kind of a student was found: which of them it was made from is known
    only where all kinds are looked for again.

    Args:
        made: the student's `factorllm.json`.

    Raises:
        FactorLLMError: when it is that text.
    """
    if text is not None and made["data"].get("kinds_of") == text_identity(text):
        raise FactorLLMError(
            f"{label} was made from some documents of {text}, those of its kind, and which is not known here, so what "
            "is measured on could be what was learned; give other text of its kind"
        )


def _what_it_is(folder: Path, partial: Path) -> str:
    """Of a folder that is no checkpoint."""
    if (origin := trimmed_from(folder)) is not None:
        return (
            f"{folder} is a dense model, trimmed from {origin} by factorllm, and no student: its FFNs are whole. What "
            "was left out is in its README.md; `factorllm factorize` makes a student of it"
        )
    hint = f"; {partial} is an unfinished run, repeat its command to finish it" if partial.exists() else ""
    return f"{folder} is no checkpoint made by factorllm: it has no {PROVENANCE}{hint}"


def load_student(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The checkpoint in transformers, ready to run, with its adapters where it has some.

    Raises:
        FactorLLMError: when one of its files is missing or damaged.
    """
    shape = _shape_of(folder)
    if shape.top_k > shape.experts:
        raise FactorLLMError(
            f"{folder}/config.json says that {shape.top_k} of {shape.experts} experts run for a token; make the "
            "checkpoint again"
        )
    model, found = load_language_model(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise FactorLLMError(f"{folder} has no tensor {missing[0]}: the checkpoint is damaged; make it again")
    model = model.to(device).eval()
    if adapter_folders(folder):
        mix_adapters(model, folder, read_tokenizer(folder, str(folder)))
    return model


def check_shape(folder: Path, shape: Shape) -> None:
    """Check that a student has the experts that its recipe says.

    Raises:
        FactorLLMError: when its config says others.
    """
    found = _shape_of(folder)
    if (found.experts, found.top_k) != (shape.experts, shape.top_k) or (
        shape.experts and found.expert_width != shape.expert_width
    ):
        raise FactorLLMError(
            f"{folder} has {found.experts} experts of {found.expert_width} neurons, {found.top_k} active, but its "
            f"factorllm.json says {shape.experts} of {shape.expert_width}, {shape.top_k} active; make it again"
        )


def _shape_of(folder: Path) -> Shape:
    """A student's shape, as its config says."""
    return _from_config(folder, lambda config: host_of(config).shape(config))


def _from_config(folder: Path, read: Callable[[PreTrainedConfig], Read]) -> Read:
    config, _, _ = open_folder(folder, str(folder))
    with refusing(f"{folder}/config.json", "make the checkpoint again"):
        return read(config)


def read_partitions(folder: Path, shape: Shape) -> list[Partition]:
    """The partition of each dense FFN's neurons, in the order of layers.

    Raises:
        FactorLLMError: when the checkpoint does not say it, or says something that is no partition of this shape.
    """
    path = folder / PARTITION_FILE
    if not path.is_file():
        raise FactorLLMError(f"{folder} has no {PARTITION_FILE}, which heal needs; factorize again")
    cut = _from_config(folder, lambda config: len(ffn_layers(config)))
    with refusing(path, "it is damaged, for it holds no partition of each FFN: factorize again"):
        orders = [torch.tensor(order) for order in json.loads(path.read_text(encoding="utf-8"))]
        if len(orders) != cut:
            raise ValueError(f"it is of {len(orders)} FFNs, not of {cut}")
        return [partition_from_order(order, shape) for order in orders]
