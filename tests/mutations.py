"""Damage to valid inputs, as values that hypothesis draws and prints: each change is applied to a copy of a folder."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

HUGE = 10**9
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, HUGE, 2**63, 10**40, 0.0, 0.5, -1.5, 1e-30, 1e300),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "7", "0.5", "auto", "float32", "\ud83d", "x" * 300, "../up"),
    *([], {}, [[]], [None], [0], [257, 3], ["a"], {"a": 1}, {"": None}, [0] * 50),
)
"""What a value of another kind than expected may be."""

MISSING = "missing"
OTHER_CONTENTS = {
    "empty": b"",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b"\xff\xfe\xfa{}",
    "deeply nested": b"[" * 100_000,
    "an object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a string": b'"text"',
    "an open brace": b"{",
    "zeros": bytes(64),
    "web page": b"<!DOCTYPE html><html></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
}


@dataclass(frozen=True)
class Edit:
    """A place in a JSON document, and its new value; `MISSING` drops it."""

    path: tuple
    value: object

    def apply(self, document: object) -> object:
        if not self.path:
            return copy.deepcopy(self.value)
        *above, last = self.path
        place = document
        try:
            for key in above:
                place = place[key]
            if self.value is MISSING:
                del place[last]
            else:
                place[last] = copy.deepcopy(self.value)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier edit took the place away
        return document


def edited(document: object, edits: tuple[Edit, ...]) -> object:
    document = copy.deepcopy(document)
    for edit in edits:
        document = edit.apply(document)
    return document


@dataclass(frozen=True)
class InJson:
    """Edits of a JSON file."""

    name: str
    edits: tuple[Edit, ...]

    def apply(self, folder: Path) -> None:
        path = folder / self.name
        document = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(edited(document, self.edits)))


@dataclass(frozen=True)
class Flipped:
    """Bytes of a file, at shares of its length, or in its first `near` bytes, combined with others by exclusive or."""

    name: str
    flips: tuple[tuple[float, int], ...]
    near: int | None = None

    def apply(self, folder: Path) -> None:
        content = bytearray((folder / self.name).read_bytes())
        span = min(self.near or len(content), len(content))
        for share, mask in self.flips:
            content[min(int(share * span), span - 1)] ^= mask
        (folder / self.name).write_bytes(content)


@dataclass(frozen=True)
class Cut:
    """A file that ends early, at a share of its length."""

    name: str
    share: float

    def apply(self, folder: Path) -> None:
        content = (folder / self.name).read_bytes()
        (folder / self.name).write_bytes(content[: int(self.share * len(content))])


@dataclass(frozen=True)
class Replaced:
    """Something else where a file was: one of `OTHER_CONTENTS`, nothing, a folder, a link to nowhere or to itself."""

    name: str
    by: str

    def apply(self, folder: Path) -> None:
        path = folder / self.name
        path.unlink(missing_ok=True)
        if self.by in OTHER_CONTENTS:
            path.write_bytes(OTHER_CONTENTS[self.by])
        elif self.by == "a folder":
            path.mkdir()
        elif self.by == "a link to itself":
            path.symlink_to(path.name)
        elif self.by == "a link to nowhere":
            path.symlink_to("nowhere")


@dataclass(frozen=True)
class InTensors:
    """A change of one tensor of a safetensors file; `how` is a name of `TENSOR_CHANGES`."""

    name: str
    tensor: str
    how: str

    def apply(self, folder: Path) -> None:
        tensors = load_file(folder / self.name)
        if self.tensor in tensors:
            TENSOR_CHANGES[self.how](tensors, self.tensor)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / self.name, metadata={"format": "pt"})


@dataclass(frozen=True)
class InHeader:
    """Edits of the JSON header of a safetensors file."""

    name: str
    edits: tuple[Edit, ...]

    def apply(self, folder: Path) -> None:
        content = (folder / self.name).read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.dumps(edited(json.loads(content[8:start]), self.edits)).encode()
        (folder / self.name).write_bytes(struct.pack("<Q", len(header)) + header + content[start:])


def _map(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, str], None]:
    def apply(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = change(tensors[name])

    return apply


def _cast(dtype: torch.dtype) -> Callable[[dict, str], None]:
    return _map(lambda tensor: tensor.to(dtype))


def _cast_all(dtype: torch.dtype) -> Callable[[dict, str], None]:
    def apply(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    return apply


def _set_first(value: float) -> Callable[[dict, str], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.flatten()[0] = value
        return tensor

    return _map(change)


def _add(suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, str], None]:
    def apply(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name.removesuffix(".weight") + suffix] = make(tensors[name])

    return apply


def _rename(change: Callable[[str], str]) -> Callable[[dict, str], None]:
    def apply(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[change(name)] = tensors.pop(name)

    return apply


TENSOR_CHANGES: dict[str, Callable[[dict, str], None]] = {
    "dropped": lambda tensors, name: tensors.pop(name),
    "renamed": _rename(lambda name: name + ".old"),
    "without prefix": _rename(lambda name: name.removeprefix("model.")),
    "with prefix": _rename(lambda name: "base_model.model." + name),
    "in layer 9": _rename(lambda name: name.replace("layers.0", "layers.9")),
    "a bias more": _add(".bias", lambda tensor: torch.ones(len(tensor))),
    "a scale more": _add(".weight_scale", lambda tensor: torch.ones(1)),
    "inverse frequencies more": _add(".rotary_emb.inv_freq", lambda tensor: torch.ones(4)),
    "a row less": _map(lambda tensor: tensor[:-1]),
    "a row more": _map(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "transposed": _map(lambda tensor: tensor.t() if tensor.dim() == 2 else tensor[None]),
    "flat": _map(lambda tensor: tensor.flatten()),
    "with a dimension more": _map(lambda tensor: tensor[None]),
    "empty": _map(lambda tensor: tensor[:0]),
    "a scalar": _map(lambda tensor: tensor.flatten()[0]),
    "NaN": _set_first(float("nan")),
    "infinite": _set_first(float("inf")),
    "all zero": _map(torch.zeros_like),
    "too large for float16": _set_first(1e6),
    "float64": _cast(torch.float64),
    "float16": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "int8": _cast(torch.int8),
    "int64": _cast(torch.int64),
    "bool": _cast(torch.bool),
    "fp8": _cast(torch.float8_e4m3fn),
    "fp8, of range": _cast(torch.float8_e5m2),
    "complex": _cast(torch.complex64),
    "all float16": _cast_all(torch.float16),
    "all bfloat16": _cast_all(torch.bfloat16),
    "all float64": _cast_all(torch.float64),
    "all fp8": _cast_all(torch.float8_e4m3fn),
    "all int8": _cast_all(torch.int8),
}


def paths_of(document: object, depth: int = 4, few: int = 4) -> list[tuple]:
    """Every place in a JSON document down to a depth, the first few of long lists and mappings."""
    found: list[tuple] = [()]
    if depth and isinstance(document, dict):
        keys = list(document)
        keys = keys if len(keys) < 60 else keys[:few]
    elif depth and isinstance(document, list):
        keys = list(range(min(len(document), few)))
    else:
        return found
    for key in keys:
        found += [(key, *path) for path in paths_of(document[key], depth - 1, few)]
    return found


def edits_of(document: object, likely: dict[tuple, tuple] | None = None, most: int = 3) -> st.SearchStrategy:
    """One to `most` edits of a JSON document: of any place in it, and of `likely` ones with values that fit there."""
    anywhere = st.builds(Edit, st.sampled_from(paths_of(document)), st.sampled_from((MISSING, *ODD_VALUES)))
    kinds = [anywhere]
    if likely:
        fitting = [Edit(path, value) for path, values in likely.items() for value in values]
        odd = st.builds(Edit, st.sampled_from(list(likely)), st.sampled_from(ODD_VALUES))
        kinds += [st.sampled_from(fitting), st.sampled_from(fitting), odd]
    return st.lists(st.one_of(kinds), min_size=1, max_size=most, unique_by=lambda edit: edit.path).map(tuple)


def damage_of(name: str, header: int | None = None) -> st.SearchStrategy:
    """Damage to the bytes of a file: flipped ones, in its first `header` bytes too, an early end, another content."""
    flips = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4).map(tuple)
    others = [*OTHER_CONTENTS, MISSING, "a folder", "a link to itself", "a link to nowhere"]
    return st.one_of(
        st.builds(Flipped, st.just(name), flips, st.sampled_from([None, header])),
        st.builds(Cut, st.just(name), st.floats(0, 1, exclude_max=True)),
        st.builds(Replaced, st.just(name), st.sampled_from(others)),
    )
