"""A GGUF file of a dense model, dequantised tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, one_line
from factorllm.families import FAMILIES
from factorllm.pretrained import load_config, load_tokenizer
from factorllm.sources.model import ModelSource, check_family
from factorllm.sources.pretokenizers import PRE_TOKENIZERS

_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


class GGUFSource(ModelSource):
    """A GGUF file of a dense model. Quantised tensors are dequantised as they are read."""

    def __init__(self, path: Path):
        self.label = str(path)
        self.path = path
        self._reader = open_gguf(path)
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
        tokenizer = load_tokenizer(self.path.parent, self.label, gguf_file=self.path.name)
        # transformers takes GPT-2's way of cutting text for every byte-level GGUF, so numbers would be cut wrongly.
        if cutting := PRE_TOKENIZERS.get(self._field("tokenizer.ggml.pre")):
            tokenizer.backend_tokenizer.pre_tokenizer = cutting
        return tokenizer

    @property
    def licence(self) -> str | None:
        return self._field("general.license")

    def _field(self, key: str) -> object | None:
        field = self._reader.fields.get(key)
        return field.contents() if field else None

    def _read_config(self) -> PreTrainedConfig:
        check_family(self.label, self._field("general.architecture"))
        config = load_config(self.path.parent, self.label, gguf_file=self.path.name)
        config.tie_word_embeddings = "output.weight" not in {t.name for t in self._reader.tensors}
        # The float that GGUF stores as fp32 comes back as 9.99e-06; the model was made with its short form.
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
        return config

    def _map_names(self) -> dict[str, str]:
        layers = self.config.num_hidden_layers
        table = gguf.get_tensor_name_map(_ARCHITECTURES[FAMILIES[self.config.model_type].gguf], layers)
        where = {}
        for name in self.parameter_names():
            gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name in self._tensors:
                where[name] = gguf_name
        if unknown := sorted(set(self._tensors) - set(where.values())):
            raise FactorLLMError(
                f"{self.label} holds {len(unknown)} tensors that a plain {self.config.model_type} model does not have, "
                f"{unknown[0]} among them (rope_freqs is llama3 RoPE scaling); use the model's safetensors checkpoint "
                "instead"
            )
        return where

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[self._where[name]]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise FactorLLMError(
                f"{self.label}: {tensor.tensor_type.name} tensors cannot be dequantised; use a file of another type, "
                "Q8_0 or F16 for the best quality"
            ) from None
        weight = torch.from_numpy(values.copy())
        if FAMILIES[self.config.model_type].gguf != "llama":
            return weight
        if name.endswith("q_proj.weight"):
            return _unpermute(weight, self.config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(weight, self.config.num_key_value_heads)
        return weight


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A GGUF file, checked to be whole.

    Raises:
        FactorLLMError: when it is not.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, OverflowError, KeyError) as error:
        raise FactorLLMError(
            f"{path} is not a whole GGUF file ({one_line(error)}): truncated or damaged; fetch it again"
        ) from None
    end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
    if end == 0 or end > path.stat().st_size:
        raise FactorLLMError(f"{path} is truncated: its last tensor ends past the file; fetch it again")
    return reader


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the rotary halves of Q and K rows: (out, in) -> (out, in)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
