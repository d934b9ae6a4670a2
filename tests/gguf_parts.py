"""GGUF files taken apart, changed, and put together again, right or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as Kind
from hypothesis import strategies as st
from mutations import MISSING, ODD_VALUES

Field = tuple[object, Kind, Kind | None]
"""A value, its type, and the type of its items."""


@dataclass
class Parts:
    """What a GGUF file holds."""

    fields: dict[str, Field]
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]


def taken_apart(path: Path) -> Parts:
    reader = gguf.GGUFReader(path)
    fields = {
        key: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    return Parts(fields, {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors})


def put_together(parts: Parts, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    for key, (value, kind, items) in parts.fields.items():
        if value == []:
            continue  # the writer has no empty arrays
        writer.add_key_value(key, value, kind, sub_type=items)
    for name, (data, kind) in parts.tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class InField:
    """A key with another value, of the type that fits it; `MISSING` drops it."""

    name: str
    key: str
    value: object

    def change(self, parts: Parts) -> None:
        if self.value is MISSING:
            parts.fields.pop(self.key, None)
        else:
            parts.fields[self.key] = _typed(self.value, parts.fields.get(self.key))

    def apply(self, folder: Path) -> None:
        _change(self, folder / self.name)


@dataclass(frozen=True)
class InArray:
    """An array that is shorter or longer, or has another item."""

    name: str
    key: str
    how: str

    def change(self, parts: Parts) -> None:
        value, kind, items = parts.fields.get(self.key, ([], Kind.ARRAY, Kind.STRING))
        if isinstance(value, list) and value:
            parts.fields[self.key] = (ARRAY_CHANGES[self.how](list(value)), kind, items)

    def apply(self, folder: Path) -> None:
        _change(self, folder / self.name)


@dataclass(frozen=True)
class InTensor:
    """A tensor that is not there, or another one."""

    name: str
    tensor: str
    how: str

    def change(self, parts: Parts) -> None:
        if self.tensor in parts.tensors:
            data, kind = parts.tensors.pop(self.tensor)
            parts.tensors |= GGUF_TENSOR_CHANGES[self.how](self.tensor, data, kind)

    def apply(self, folder: Path) -> None:
        _change(self, folder / self.name)


def _change(change: InField | InArray | InTensor, path: Path) -> None:
    parts = taken_apart(path)
    change.change(parts)
    path.unlink()
    put_together(parts, path)


def _typed(value: object, before: Field | None) -> Field:
    """A value as a field, of the type that the key had where it can be."""
    if isinstance(value, (list, dict)):
        value = list(value) or [0]
        items = Kind.STRING if isinstance(value[0], str) else Kind.INT32
        return [v if isinstance(v, (str if items is Kind.STRING else int)) else 0 for v in value], Kind.ARRAY, items
    if before and before[1] is Kind.FLOAT32 and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool):
        return value, Kind.BOOL, None
    if isinstance(value, int):
        return max(min(value, 2**63 - 1), -(2**63)), Kind.UINT32 if 0 <= value < 2**32 else Kind.INT64, None
    if isinstance(value, float):
        return value, Kind.FLOAT64 if abs(value) > 1e38 else Kind.FLOAT32, None
    return str(value).encode("utf-8", "replace").decode(), Kind.STRING, None


ARRAY_CHANGES = {
    "empty": lambda items: items[:0],
    "one": lambda items: items[:1],
    "one less": lambda items: items[:-1],
    "one more": lambda items: [*items, items[-1]],
    "reversed": lambda items: items[::-1],
    "all the same": lambda items: [items[0]] * len(items),
    "the first empty": lambda items: [type(items[0])(), *items[1:]],
}


def _shaped(change) -> object:
    def apply(name: str, data: np.ndarray, kind) -> dict:
        return {name: (np.ascontiguousarray(change(data)), kind)}

    return apply


def _as_type(kind: gguf.GGMLQuantizationType) -> object:
    def apply(name: str, data: np.ndarray, _) -> dict:
        try:
            return {name: (gguf.quants.quantize(data.astype(np.float32), kind), kind)}
        except (NotImplementedError, gguf.quants.QuantError):
            return {name: (data, _)}

    return apply


def _integers(name: str, data: np.ndarray, _) -> dict:
    return {name: (data.astype(np.int8), gguf.GGMLQuantizationType.I8)}


GGUF_TENSOR_CHANGES = {
    "dropped": lambda name, data, kind: {},
    "renamed": lambda name, data, kind: {name + "_old": (data, kind)},
    "in block 9": lambda name, data, kind: {name.replace("blk.0", "blk.9"): (data, kind)},
    "one more": lambda name, data, kind: {name: (data, kind), "extra.weight": (data, kind)},
    "rope_freqs more": lambda name, data, kind: {
        name: (data, kind),
        "rope_freqs.weight": (np.ones(4, np.float32), gguf.GGMLQuantizationType.F32),
    },
    "a row less": _shaped(lambda data: data[:-1]),
    "a row more": _shaped(lambda data: np.concatenate([data, data[:1]])),
    "transposed": _shaped(lambda data: data.T),
    "flat": _shaped(lambda data: data.reshape(-1)),
    "with a dimension more": _shaped(lambda data: data[None]),
    "NaN": _shaped(lambda data: data * np.float32("nan")),
    "f16": _as_type(gguf.GGMLQuantizationType.F16),
    "bf16": _as_type(gguf.GGMLQuantizationType.BF16),
    "q8_0": _as_type(gguf.GGMLQuantizationType.Q8_0),
    "q4_0": _as_type(gguf.GGMLQuantizationType.Q4_0),
    "i8": _integers,
}


def gguf_changes(name: str, parts: Parts, likely: dict[str, tuple]) -> st.SearchStrategy:
    """A change of the header or of the tensors of a GGUF file; `likely` are keys with values that fit there."""
    arrays = [key for key, field in parts.fields.items() if field[1] is Kind.ARRAY]
    plain = [key for key in parts.fields if key not in arrays]
    fitting = [InField(name, key, value) for key, values in likely.items() for value in values]
    return st.one_of(
        st.sampled_from(fitting),
        st.builds(InField, st.just(name), st.sampled_from(plain + arrays), st.sampled_from((MISSING, *ODD_VALUES))),
        st.builds(InArray, st.just(name), st.sampled_from(arrays), st.sampled_from(list(ARRAY_CHANGES))),
        st.builds(
            InTensor, st.just(name), st.sampled_from(list(parts.tensors)), st.sampled_from(list(GGUF_TENSOR_CHANGES))
        ),
    )
