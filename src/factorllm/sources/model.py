"""Dense models, read lazily tensor by tensor: a hub id, a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
import xxhash
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorllm.errors import FactorLLMError

SUPPORTED_FAMILIES = {
    "llama": "Llama 1-3, TinyLlama, SmolLM2",
    "mistral": "Mistral",
}
"""Dense families by transformers' `model_type`. All name their tensors as Llama does."""

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}  # keys that change with where it lies
_HASH_BLOCK = 1 << 24


class ModelSource(ABC):
    """A dense model on disk. Weights are read one tensor at a time, under their transformers names.

    Attributes:
        label: the model as the user named it, for messages and the model card.
        config: the transformers config.
    """

    label: str
    config: PreTrainedConfig

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The weight files, in a fixed order."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all tensors in the files."""

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template.

        Raises:
            FactorLLMError: when the model has none.
        """

    @property
    @abstractmethod
    def licence(self) -> str | None:
        """The licence that the model states, if it states one."""

    def generation_config(self) -> GenerationConfig:
        """The model's own generation config, or the one that follows from its config."""
        return GenerationConfig.from_model_config(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One weight, in the dtype it is stored in.

        Raises:
            FactorLLMError: when it is missing, cannot be read, or holds NaN or infinity.
        """
        try:
            value = self._read(name)
        except KeyError:
            raise FactorLLMError(
                f"{self.label} has no tensor {name}: the checkpoint is incomplete; fetch it again"
            ) from None
        if not torch.isfinite(value).all():
            raise FactorLLMError(
                f"{self.label}: tensor {name} holds NaN or infinite values, so nothing can be fitted to it; "
                "the file is damaged or the model diverged: use another copy"
            )
        return value

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the config and of all weight files, in hexadecimal."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
        digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True, default=str).encode())
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def skeleton(self) -> PreTrainedModel:
        """The dense model with every parameter on the meta device: its structure, without memory."""
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa").eval()
        model.tie_weights()
        return model

    def parameter_names(self) -> list[str]:
        """Names of the parameters that must be read; a tied output head is not among them."""
        return list(dict(self.skeleton().named_parameters()))

    def load_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole dense model, for evaluation and for sampling text."""
        model = self.skeleton()
        for name in self.parameter_names():
            module, _, leaf = name.rpartition(".")
            weight = torch.nn.Parameter(self.tensor(name).to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, weight)
        model.tie_weights()
        model.generation_config = self.generation_config()
        return model.to(device)

    def _check(self) -> None:
        """Refuse models that cannot be factorised exactly, before any work is done."""
        _check_family(self.label, self.config.model_type)
        if getattr(self.config, "quantization_config", None):
            method = dict(self.config.quantization_config).get("quant_method", "unknown")
            raise FactorLLMError(
                f"{self.label} is quantised ({method}) and cannot be read tensor by tensor; give the unquantised "
                "checkpoint, or a GGUF file, whose quantisation can be undone"
            )
        if getattr(self.config, "hidden_act", "silu") != "silu":
            raise FactorLLMError(
                f"{self.label} uses the activation {self.config.hidden_act!r}; the engines compute SiLU experts only, "
                "so the student would be wrong in them: there is no host for it"
            )
        if getattr(self.config, "mlp_bias", False):
            raise FactorLLMError(
                f"{self.label} has biases in its FFN (mlp_bias), and no host architecture has them in its experts; "
                "only models without FFN biases can be factorised exactly"
            )
        self._check_names()

    def _check_names(self) -> None:
        have, want = set(self.names()), set(self.parameter_names())
        have = {name for name in have if not name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            have.discard("lm_head.weight")
        if missing := sorted(want - have):
            raise FactorLLMError(
                f"{self.label} lacks {len(missing)} tensors, {missing[0]} among them: the checkpoint is incomplete; "
                "fetch it again"
            )
        if extra := sorted(have - want):
            raise FactorLLMError(
                f"{self.label} holds {len(extra)} tensors that a plain {self.config.model_type} model does not have, "
                f"{extra[0]} among them; leaving them out would change the model, so it is refused"
            )


class SafetensorsSource(ModelSource):
    """A transformers folder with one `model.safetensors` or an index and its shards."""

    def __init__(self, folder: Path, label: str | None = None):
        self.folder = folder
        self.label = label or str(folder)
        self.config = self._read_config()
        self._where = self._locate()
        self._open: tuple[Path, safe_open] | None = None
        self._check()

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def names(self) -> Iterable[str]:
        return self._where

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if not any((self.folder / name).exists() for name in _TOKENIZER_FILES):
            raise FactorLLMError(f"{self.label} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); copy it there")
        return AutoTokenizer.from_pretrained(self.folder)

    def generation_config(self) -> GenerationConfig:
        if (self.folder / "generation_config.json").exists():
            return GenerationConfig.from_pretrained(self.folder)
        return super().generation_config()

    @property
    def licence(self) -> str | None:
        return _licence_of_card(self.folder / "README.md")

    def _read(self, name: str) -> torch.Tensor:
        path = self._where[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, _open_safetensors(path))
        return self._open[1].get_tensor(name)

    def _read_config(self) -> PreTrainedConfig:
        if not (self.folder / "config.json").is_file():
            raise FactorLLMError(f"{self.label} has no config.json, so it is not a model folder; check the path")
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
            raise FactorLLMError(f"{self.label}/config.json cannot be used: {_one_line(error)}") from None

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


class GGUFSource(ModelSource):
    """A GGUF file of a dense Llama. Quantised tensors are dequantised as they are read."""

    def __init__(self, path: Path):
        import gguf

        self.label = str(path)
        self.path = path
        self._gguf = gguf
        self._reader = self._open_file()
        self.config = self._read_config()
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._where = self._map_names()
        self._check()

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def names(self) -> Iterable[str]:
        return self._where

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    @property
    def licence(self) -> str | None:
        return self._field("general.license")

    def _field(self, key: str) -> object | None:
        field = self._reader.fields.get(key)
        return field.contents() if field else None

    def _open_file(self):
        try:
            reader = self._gguf.GGUFReader(self.path)
        except (ValueError, IndexError, OSError, OverflowError, KeyError) as error:
            raise FactorLLMError(
                f"{self.label} is not a whole GGUF file ({_one_line(error)}): truncated or damaged; fetch it again"
            ) from None
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        if end == 0 or end > self.path.stat().st_size:
            raise FactorLLMError(f"{self.label} is truncated: its last tensor ends past the file; fetch it again")
        return reader

    def _read_config(self) -> PreTrainedConfig:
        _check_family(self.label, self._field("general.architecture"))
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        config.tie_word_embeddings = "output.weight" not in {t.name for t in self._reader.tensors}
        # The float that GGUF stores as fp32 comes back as 9.99e-06; the model was made with its short form.
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
        return config

    def _map_names(self) -> dict[str, str]:
        layers = self.config.num_hidden_layers
        table = self._gguf.get_tensor_name_map(self._gguf.MODEL_ARCH.LLAMA, layers)
        where = {}
        for name in self.parameter_names():
            gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name in self._tensors:
                where[name] = gguf_name
        if unknown := sorted(set(self._tensors) - set(where.values())):
            raise FactorLLMError(
                f"{self.label} holds {len(unknown)} tensors that a plain Llama does not have, {unknown[0]} among them "
                "(rope_freqs is llama3 RoPE scaling); use the model's safetensors checkpoint instead"
            )
        return where

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[self._where[name]]
        try:
            values = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise FactorLLMError(
                f"{self.label}: {tensor.tensor_type.name} tensors cannot be dequantised; use a file of another type, "
                "Q8_0 or F16 for the best quality"
            ) from None
        weight = torch.from_numpy(values.copy())
        if name.endswith("q_proj.weight"):
            return _unpermute(weight, self.config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(weight, self.config.num_key_value_heads)
        return weight


def open_model(model: str) -> ModelSource:
    """Open a dense model: the path of a folder or of a `.gguf` file, or a hub id `owner/name`.

    Raises:
        FactorLLMError: when there is no such model, it is damaged, or its family is not supported.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsSource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFSource(path)
        raise FactorLLMError(f"{model} is a file, but not a .gguf; give a model folder, a .gguf file or a hub id")
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise FactorLLMError(f"no such model: {model} is neither a folder, a .gguf file nor a hub id (owner/name)")
    return SafetensorsSource(_download(model), label=model)


def _check_family(label: str, family: object) -> None:
    if family in SUPPORTED_FAMILIES:
        return
    known = "; ".join(f"{key} ({models})" for key, models in SUPPORTED_FAMILIES.items())
    raise FactorLLMError(
        f"{label} is of the family {family!r}, which is not supported: no host architecture is known to reproduce it "
        f"exactly; supported families: {known}"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises many unrelated classes, httpx errors among them
        raise FactorLLMError(
            f"no such model: {hub_id} is no local path, and the hub did not give it ({_one_line(error)}); "
            "check the name and the network, or give a local folder or .gguf file"
        ) from None


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FactorLLMError(f"{path} is missing, though the index names it; fetch the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise FactorLLMError(
            f"{path} is not a whole safetensors file ({_one_line(error)}): truncated or damaged; fetch it again"
        ) from None


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the rotary halves of Q and K rows: (out, in) -> (out, in)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _licence_of_card(card: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not card.exists():
        return None
    try:
        return ModelCard.load(card).data.get("license")
    except ValueError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
