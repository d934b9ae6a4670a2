"""A folder of safetensors, on disk or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, one_line
from factorllm.pretrained import load_config, load_generation_config, load_tokenizer
from factorllm.sources.model import ModelSource

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class TensorFolder:
    """The tensors of a transformers folder with one `model.safetensors` or an index and its shards, read lazily.

    Raises:
        FactorLLMError: when the folder has no safetensors, or one of them is missing or damaged.
    """

    def __init__(self, folder: Path, label: str | None = None):
        self.folder, self.label = folder, label or str(folder)
        self._where = self._locate()
        self._open: tuple[Path, safe_open] | None = None

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def names(self) -> Iterable[str]:
        return self._where

    def read(self, name: str) -> torch.Tensor:
        path = self._where[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, _open_safetensors(path))
        return self._open[1].get_tensor(name)

    def _locate(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                shards = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError):
                raise FactorLLMError(f"{index} is damaged: it has no weight_map; fetch it again") from None
        elif (self.folder / "model.safetensors").exists():
            shards = dict.fromkeys(_open_safetensors(self.folder / "model.safetensors").keys(), "model.safetensors")
        else:
            raise FactorLLMError(
                f"{self.label} has no safetensors weights; pickled .bin files are never loaded: save the model with "
                "save_pretrained(), which writes safetensors"
            )
        where = {name: self.folder / shard for name, shard in shards.items()}
        for path in sorted(set(where.values())):
            _open_safetensors(path)
        return where


class SafetensorsSource(ModelSource):
    """A dense model in a transformers folder of safetensors."""

    def __init__(self, folder: Path, label: str | None = None):
        self.folder = folder
        self.label = label or str(folder)
        self.config = read_config(folder, self.label)
        self._tensors = TensorFolder(folder, self.label)
        self._check()

    @property
    def files(self) -> list[Path]:
        return self._tensors.files

    def names(self) -> Iterable[str]:
        return self._tensors.names()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.folder, self.label)

    def generation_config(self) -> GenerationConfig:
        if (self.folder / "generation_config.json").exists():
            return load_generation_config(self.folder)
        return super().generation_config()

    @property
    def licence(self) -> str | None:
        return licence_of_card(self.folder / "README.md")

    def _read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """The config of a transformers folder."""
    if not (folder / "config.json").is_file():
        raise FactorLLMError(f"{label} has no config.json, so it is not a model folder; check the path")
    return load_config(folder, f"{label}/config.json")


def read_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FactorLLMError(f"{label} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); copy it there")
    return load_tokenizer(folder, label)


def download(hub_id: str) -> Path:
    """The local folder of a hub model, fetched if it is not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises many unrelated classes, httpx errors among them
        raise FactorLLMError(
            f"no such model: {hub_id} is no local path, and the hub did not give it ({one_line(error)}); "
            "check the name and the network, or give a local folder or .gguf file"
        ) from None


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FactorLLMError(f"{path} is missing, though the index names it; fetch the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise FactorLLMError(
            f"{path} is not a whole safetensors file ({one_line(error)}): truncated or damaged; fetch it again"
        ) from None


def licence_of_card(card: Path) -> str | None:
    """The licence that a model card states."""
    from huggingface_hub import ModelCard

    if not card.exists():
        return None
    try:
        return ModelCard.load(card).data.get("license")
    except ValueError:
        return None
