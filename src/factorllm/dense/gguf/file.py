"""A GGUF file of a dense model, or its split parts, dequantised tensor by tensor."""

from __future__ import annotations

import copy
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.families import family_of, head_dim
from factorllm.dense.gguf.config import family_of_architecture, read_config
from factorllm.dense.gguf.keys import Keys
from factorllm.dense.gguf.sampling import read_sampling
from factorllm.dense.gguf.tokenizer import build_tokenizer, end_tokens
from factorllm.dense.model import ModelSource
from factorllm.errors import FactorLLMError, refusing

_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_ROPE_FREQS = "rope_freqs.weight"
_ROWS_AT_ONCE = 4096
_AGAIN = "it is truncated or damaged: fetch it again"


class GGUFSource(ModelSource):
    """A GGUF file of a dense model. Quantised tensors are dequantised as they are read.

    Args:
        path: the file; of a split model, any of its parts.
    """

    def __init__(self, path: Path):
        self.label = str(path)
        self._readers = _open_parts(path)
        self._fields = next(iter(self._readers.values())).fields
        self._check_kind()
        self._tensors = {tensor.name: tensor for reader in self._readers.values() for tensor in reader.tensors}
        self.config = self._read_config()
        shapes = self.parameter_shapes()
        self._where = self._map_names(shapes)
        # llama.cpp takes the biases that a file lacks as zero.
        absent = (name for name in shapes if name.endswith(".bias") and name not in self._where)
        self._absent_biases = {name: shapes[name] for name in absent}
        self._check()

    @property
    def files(self) -> list[Path]:
        return list(self._readers)

    @property
    def stored_types(self) -> set[str]:
        """GGUF's names of the types that matrices are stored in."""
        return {tensor.tensor_type.name for tensor in self._tensors.values() if len(tensor.shape) > 1}

    def names(self) -> Iterable[str]:
        return self._where

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._absent_biases:
            return self._absent_biases[name]
        return tuple(int(size) for size in reversed(self._tensors[self._where[name]].shape))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        built = build_tokenizer(self._tokenizer_field, self.label, self.config.max_position_embeddings)
        return self._checked(built)

    def generation_config(self) -> GenerationConfig:
        config = super().generation_config()
        if ends := end_tokens(self._tokenizer_field):
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
        read_sampling(self._field, config)
        return config

    def with_weights_of(self, model: PreTrainedModel) -> GGUFSource:
        """The same, of which some weights have been read already: those of `load_reference`."""
        read = dict(model.named_parameters())
        other = copy.copy(self)
        other._read = lambda name: read[name].detach() if name in read else self._read(name)
        return other

    @property
    def licence(self) -> str | None:
        licence = self._field("general.license")
        return licence if isinstance(licence, str) else None

    def _field(self, key: str) -> object | None:
        return read_field(self.label, self._fields, key)

    def _tokenizer_field(self, key: str) -> object | None:
        return self._field(f"tokenizer.{key}")

    def _check_kind(self) -> None:
        kind = self._field("general.type") or "model"
        if kind != "model" or any(key.startswith("adapter.") for key in self._fields):
            raise FactorLLMError(f"{self.label} holds no model but a part of one ({kind}); give the file of a model")

    def _read_config(self) -> PreTrainedConfig:
        architecture = self._field("general.architecture")
        family = family_of_architecture(self.label, architecture)
        keys = Keys(self.label, self._fields, architecture)
        ids = {kind: self._field(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding")}
        tokens = self._field("tokenizer.ggml.tokens")
        ids["vocabulary"] = len(tokens) if isinstance(tokens, list) else None
        rope_freqs = None
        if _ROPE_FREQS in self._tensors and architecture == "llama":  # llama.cpp heeds them in no other of ours
            rope_freqs = self._dequantised(self._tensors.pop(_ROPE_FREQS))
        return read_config(keys, family, ids, set(self._tensors), rope_freqs)

    def _map_names(self, names: Iterable[str]) -> dict[str, str]:
        layers = self.config.num_hidden_layers
        table = gguf.get_tensor_name_map(_ARCHITECTURES[family_of(self.config).gguf], layers)
        where = {}
        for name in names:
            gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name in self._tensors:
                where[name] = gguf_name
        if unknown := sorted(set(self._tensors) - set(where.values())):
            raise FactorLLMError(
                f"{self.label} holds {len(unknown)} tensors that a plain {self.config.model_type} model does not have, "
                f"{unknown[0]} among them; leaving them out would change the model: use its safetensors checkpoint"
            )
        return where

    def _lacks(self, name: str) -> bool:
        return super()._lacks(name) and name not in self._absent_biases

    def _read(self, name: str) -> torch.Tensor:
        if name in self._absent_biases:
            return torch.zeros(self._absent_biases[name])
        weight = self._dequantised(self._tensors[self._where[name]])
        if self.config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            return weight - 1  # transformers multiplies with 1 + the weight
        if family_of(self.config).gguf != "llama":
            return weight
        if ".q_proj." in name:
            return _unpermute(weight, self.config.num_attention_heads, head_dim(self.config))
        if ".k_proj." in name:
            return _unpermute(weight, self.config.num_key_value_heads, head_dim(self.config))
        return weight

    def _dequantised(self, tensor: gguf.ReaderTensor) -> torch.Tensor:
        instead = "use a file of another type, Q8_0 or F16 for the best quality"
        with refusing(f"tensor {tensor.name} of {self.label}, of type {tensor.tensor_type.name},", instead):
            weight = np.empty(tuple(reversed(tensor.shape.tolist())), np.float32)
            rows, stored = weight.reshape(-1, weight.shape[-1]), tensor.data.reshape(-1, tensor.data.shape[-1])
            for start in range(0, len(rows), _ROWS_AT_ONCE):  # gguf holds twice what it is given
                part = slice(start, start + _ROWS_AT_ONCE)
                rows[part] = gguf.quants.dequantize(stored[part], tensor.tensor_type)
        _forget_pages(tensor.data)
        return torch.from_numpy(weight)


def _forget_pages(data: np.ndarray) -> None:
    """Let go of the pages of a mapped file that an array is a part of; whoever reads it again gets them again."""
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class _Reader(gguf.GGUFReader):
    """A reader that ends where the file does, and reads a large vocabulary at once.

    gguf's own goes on for as many entries as a damaged header says, and takes 8 s for a vocabulary of 150,000.
    """

    def _get(self, offset: int, dtype, count: int = 1, **more) -> np.ndarray:
        self._check_end(int(offset) + int(count) * np.dtype(dtype).itemsize)
        self.data = np.asarray(self.data)  # each token is a slice of it, and slices of a memmap take 0.5 KB
        return super()._get(offset, dtype, count, **more)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[np.ndarray], list[int], list]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        head = kind.nbytes + count.nbytes
        start, number = orig_offs + head, self.gguf_scalar_to_np.get(kind[0])
        if count[0] and number:
            parts = [self._get(start, number, count[0])]
            size = parts[0].nbytes
        elif count[0] and kind[0] == gguf.GGUFValueType.STRING:
            parts, size = self._strings(start, int(count[0]))
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        places = list(range(2, 2 + len(parts)))
        return head + size, [kind, count, *parts], places, [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]

    def _strings(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
        """The bytes of each, and how many bytes they take with their lengths."""
        little = self.endianess == gguf.GGUFEndian.LITTLE
        length, found, at = struct.Struct("<Q" if little else ">Q"), [], start
        for _ in range(count):
            self._check_end(at + length.size)
            end = at + length.size + length.unpack_from(self.data, at)[0]
            self._check_end(end)
            found.append(self.data[at + length.size : end])
            at = end
        return found, at - start

    def _check_end(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError("its header goes on past its end")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A GGUF file, checked to be whole.

    Raises:
        FactorLLMError: when it is not, or has the byte order of other machines.
    """
    with refusing(path, _AGAIN):
        reader = _Reader(path)
        swapped = reader.byte_order == "S"
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        names = [t.name for t in reader.tensors]
    if swapped:  # gguf swaps what the header says, and reads weights as they are
        order = reader.endianess.name.lower()
        raise FactorLLMError(
            f"{path} is {order}-endian, for machines of another byte order, and llama.cpp does not load it either; "
            "fetch the file for this one, or turn a copy into it: gguf-convert-endian FILE native"
        )
    if end > path.stat().st_size:
        raise FactorLLMError(f"{path} is truncated: its last tensor ends past the file; fetch it again")
    if len(set(names)) < len(names):
        raise FactorLLMError(f"{path} is damaged: it has two tensors of one name; fetch it again")
    return reader


def read_field(label: str, fields: dict[str, gguf.ReaderField], key: str) -> object | None:
    """What a key says, None where it is not there.

    Raises:
        FactorLLMError: when its content is damaged.
    """
    field = fields.get(key)
    if field is None:
        return None
    with refusing(label, _AGAIN):
        return field.contents()


def _open_parts(path: Path) -> dict[Path, gguf.GGUFReader]:
    """The file, or all parts of a split model (`NAME-00001-of-00003.gguf` ...), the first of which has the keys."""
    found = _PART.fullmatch(path.name)
    count = int(found[3]) if found else 1
    paths = [path.with_name(f"{found[1]}-{i + 1:05d}-of-{found[3]}.gguf") for i in range(count)] if found else [path]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FactorLLMError(f"{path} is one of {count} parts, and {missing[0]} is not beside it; fetch that too")
    readers = {part: open_gguf(part) for part in paths}
    parts = [split_count(part, reader) for part, reader in readers.items()]
    if parts != [count] * count:
        raise FactorLLMError(
            f"{path} is one of {max(parts)} parts of a split model, but its name says that there are {count}; name the "
            "parts as they were: NAME-00001-of-00003.gguf, beside one another"
        )
    names = Counter(tensor.name for reader in readers.values() for tensor in reader.tensors)
    if not names:
        raise FactorLLMError(f"{path} holds no tensors; {_AGAIN}")
    if twice := [name for name, times in names.items() if times > 1]:
        raise FactorLLMError(
            f"{path} and the parts beside it are of more than one split: {twice[0]} is in two of them; fetch all parts "
            "of one model in one type, into a folder of their own"
        )
    return readers


def split_count(path: Path, reader: gguf.GGUFReader) -> int:
    """How many parts the model is split into; 1 if it is whole.

    Raises:
        FactorLLMError: when the header is damaged.
    """
    field = reader.fields.get("split.count")
    if field is None:
        return 1
    with refusing(path, _AGAIN):
        return int(field.contents()) or 1


def _unpermute(weight: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the rotary halves of Q and K rows: (heads x width, ...) -> the same."""
    return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
