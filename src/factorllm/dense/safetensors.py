"""A folder of safetensors, on disk or from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.config_checks import check_depth, check_family
from factorllm.dense.hub import INDEX, SINGLE
from factorllm.dense.model import ModelSource
from factorllm.dense.names import HEAD, embeddings, without_backbone
from factorllm.dense.pretrained import load_config, load_pretrained, load_tokenizer, read_generation_config
from factorllm.dense.wrappers import Wrapper, unwrapped
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.output import PROCESSOR_TEMPLATE, companions, refuse_folder_of_checkpoints

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MOST_LABELS = 1 << 20  # transformers makes a name for each
_FLOATS = ("F64", "F32", "F16", "BF16")
_AGAIN = "it is not a whole safetensors file: truncated or damaged; fetch it again"


class TensorFolder:
    """The tensors of a transformers folder, read lazily from the files that transformers would take.

    Raises:
        FactorLLMError: when the folder has no safetensors, one of them is missing or damaged, or an adapter would
            change the weights.
    """

    def __init__(self, folder: Path, label: str | None = None):
        self.folder, self.label = folder, label or str(folder)
        if (folder / "adapter_config.json").exists():
            raise FactorLLMError(
                f"{self.label} holds an adapter beside its weights (adapter_config.json), which would be left out; "
                "merge it into them (peft's merge_and_unload), or remove it"
            )
        # transformers takes the single file where there is one, even beside an index.
        index = {} if (folder / SINGLE).is_file() else self._index()
        paths = self._shards(index) if index else [folder / SINGLE]
        # It loads all tensors of the shards, so what counts is in them; the index must not know of more.
        self._where = {name: path for path in paths for name in _names(path)}
        if lost := sorted(index.keys() - self._where.keys()):
            raise FactorLLMError(
                f"{self.label}: {INDEX} names {lost[0]}, which is in none of its files; fetch the checkpoint again"
            )
        self._open: tuple[Path, safe_open] | None = None
        self._stored = {name: name for name in self._where}
        self.others: list[str] = []

    def show(self, text_name: Callable[[str], str | None]) -> None:
        """Show the tensors of the text model only, by their names there; the names in the files of what is not of it
        are in `others`.

        Args:
            text_name: of a name in the files, None for what is not of the text model.
        """
        text = {name: text_name(name) for name in self._where}
        self._stored = {shown: name for name, shown in text.items() if shown}
        self.others = [name for name, shown in text.items() if shown is None]

    def hide(self, prefix: str) -> list[str]:
        """Leave out tensors, and say which."""
        hidden = [name for name in self._where if name.startswith(prefix)]
        self._stored = {shown: name for shown, name in self._stored.items() if name not in hidden}
        self.others = [name for name in self.others if name not in hidden]
        return hidden

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def names(self) -> Collection[str]:
        return self._stored

    def read_stored(self, stored: str) -> torch.Tensor:
        """A tensor by its name in the files, one of `others` too."""
        file, path = self._file_at(stored)
        with refusing(path, _AGAIN):
            return file.get_tensor(stored)

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            FactorLLMError: when it is not there or cannot be read.
        """
        return self.read_stored(self._stored_name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header.

        Raises:
            FactorLLMError: when it is not there, or quantised.
        """
        stored = self._stored_name(name)
        file, path = self._file_at(stored)
        with refusing(path, _AGAIN):
            tensor = file.get_slice(stored)
            shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if kind not in _FLOATS:
            raise FactorLLMError(
                f"{self.label}: tensor {name} is stored as {kind}, so it is quantised, and its scales are not applied; "
                "give the unquantised checkpoint (safetensors in F32, F16 or BF16)"
            )
        return shape

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise FactorLLMError(f"{self.label} has no tensor {name}: it is incomplete; fetch it again")
        return self._stored[name]

    def _file_at(self, stored: str) -> tuple[safe_open, Path]:
        path = self._where[stored]
        if self._open is None or self._open[0] != path:
            self._open = (path, _open_safetensors(path))
        return self._open[1], path

    def _shards(self, index: dict[str, str]) -> list[Path]:
        shards = sorted(set(index.values()))
        with refusing(self.folder / INDEX, "it is damaged: fetch it again"):
            missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise FactorLLMError(
                f"{self.label}: {missing[0]} is missing, though the index names it; fetch the checkpoint again"
            )
        return [self.folder / shard for shard in shards]

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            if others := sorted(self.folder.glob("*.safetensors")):
                raise FactorLLMError(
                    f"{self.label} has {others[0].name}, but neither {SINGLE} nor {INDEX}, which says where tensors "
                    "are; fetch the whole checkpoint, or save the model with save_pretrained()"
                )
            raise FactorLLMError(
                f"{self.label} has no safetensors weights; pickled .bin files are never loaded: save the model with "
                "save_pretrained(), which writes safetensors"
            )
        with refusing(path, "it is damaged: fetch it again"):
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = content["weight_map"]
            kinds = {type(shard) for shard in shards.values()}
            if not isinstance(content["metadata"], dict) or kinds != {str}:
                raise ValueError("its metadata is none, or its weight_map does not map names to files")
            return shards


class SafetensorsSource(ModelSource):
    """A dense model in a transformers folder of safetensors."""

    def __init__(self, folder: Path, label: str | None = None):
        self.folder = folder
        self.label = label or str(folder)
        config, self.wrapper, self.tensors = open_folder(folder, self.label)
        self.config = config
        check_family(self.label, config)
        check_depth(self.label, config.num_hidden_layers, len(self.tensors.names()))
        notes = []
        if ahead := self.tensors.hide("mtp."):
            notes.append(f"{len(ahead)} tensors of {self.label} that predict more than one token (mtp.) are left out")
        if code := self.config.__dict__.pop("auto_map", None):  # a student must not ask its users to run it
            notes.append(
                f"{self.label} names Python of its own ({', '.join(map(str, code))}), which is never run: it is read "
                f"as transformers' own {self.config.model_type}"
            )
        self.note = "; ".join(notes)
        self.config.tie_word_embeddings = ties_embeddings(self.config, self.tensors)
        self._check()

    @property
    def files(self) -> list[Path]:
        return self.tensors.files

    @property
    def companions(self) -> list[Path]:
        # A text model's config is in the fingerprint; what is round it is said in the whole one's.
        return [path for path in companions(self.folder) if self.wrapper or path.name != "config.json"]

    def names(self) -> Iterable[str]:
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._checked(read_tokenizer(self.folder, self.label))

    def generation_config(self) -> GenerationConfig:
        return read_generation_config(self.folder, self.config)

    def load_reference(self, config: PreTrainedConfig) -> PreTrainedModel:
        # From the files, not from the tensors that are read here: that is what is to be compared.
        return load_pretrained(self.folder, config, self.wrapper, dtype=torch.float32)

    @property
    def licence(self) -> str | None:
        return licence_of_card(self.folder / "README.md")

    def _read(self, name: str) -> torch.Tensor:
        return self.tensors.read(name)


def open_folder(folder: Path, label: str) -> tuple[PreTrainedConfig, Wrapper | None, TensorFolder]:
    """A transformers folder: the config of its text model, what is round it, and the text model's tensors.

    Raises:
        FactorLLMError: when it is none, or damaged.
    """
    whole, tensors = read_config(folder, label), TensorFolder(folder, label)
    with refusing(f"{label}/config.json", "it is damaged: use another copy"):
        config, wrapper = unwrapped(whole, tensors.names())
    if wrapper:
        tensors.show(wrapper.text_name)
    elif config.model_type == "nemotron_h":
        tensors.show(without_backbone)
    return config, wrapper, tensors


def load_language_model(folder: Path | str, **options) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """The language model in a transformers folder, without what is round it; `options` are those of
    `from_pretrained`.

    Raises:
        FactorLLMError: when the folder is damaged.
    """
    config, wrapper, _ = open_folder(Path(folder), str(folder))
    return load_pretrained(folder, config, wrapper, **options)


def ties_embeddings(config: PreTrainedConfig, tensors: TensorFolder) -> bool:
    """Whether the output head is the embedding table: as the config says, unless the file has a head that differs.

    transformers decides so too; the engines that believe the config would throw the head away.
    """
    names, table = set(tensors.names()), embeddings(config)
    tied = bool(getattr(config, "tie_word_embeddings", False))  # a text model's config may leave it to the whole one's
    if not tied or HEAD not in names or table not in names:
        return tied
    return torch.equal(tensors.read(table), tensors.read(HEAD))


def read_config(folder: Path, label: str) -> PreTrainedConfig:
    """The config of a transformers folder."""
    refuse_folder_of_checkpoints(folder)
    if not (folder / "config.json").is_file():
        raise FactorLLMError(f"{label} has no config.json, so it is not a model folder; check the path")
    with refusing(f"{label}/config.json", "it is damaged: use another copy"):
        labels = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_labels")
    if isinstance(labels, int | float) and labels > _MOST_LABELS:
        raise FactorLLMError(f"{label}/config.json says num_labels = {labels}, which no language model has; remove it")
    return load_config(folder, f"{label}/config.json")


def read_tokenizer(folder: Path, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder, with the chat template of its processor where it has none itself."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FactorLLMError(f"{label} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); copy it there")
    tokenizer, path = load_tokenizer(folder, label), folder / PROCESSOR_TEMPLATE
    if not tokenizer.chat_template and path.is_file():
        with refusing(path, "mend it, or remove it"):
            template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
            if not isinstance(template, str):
                raise ValueError("its chat_template is no text")
            tokenizer.chat_template = template
    return tokenizer


def _open_safetensors(path: Path) -> safe_open:
    with refusing(path, _AGAIN):
        path.open("rb").close()  # of one that may not be read, safetensors says that it is not there
        return safe_open(path, framework="pt")


def _names(path: Path) -> list[str]:
    return list(_open_safetensors(path).keys())


def licence_of_card(card: Path) -> str | None:
    """The licence that a model card states."""
    from huggingface_hub import ModelCard

    if not card.exists():
        return None
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (ValueError, OSError):
        return None
    return " ".join(licence.split()) if isinstance(licence, str) else None
