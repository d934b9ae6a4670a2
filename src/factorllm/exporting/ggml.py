"""ggml's own quantiser, in the extension module of xllamacpp: K-quants, IQ4, and importance weights for all types."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from factorllm.errors import FactorLLMError
from factorllm.runs.stored import refuse_lost

ONLY_GGML = frozenset({Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS})
"""Types that the package gguf reads but does not write."""

WEIGHTED = ONLY_GGML | {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1}
"""Types for which ggml heeds importance weights."""

_MISSING = (
    "ggml, which quantises to K-quants, IQ4 and by importance, is not installed; pip install 'factorllm[llamacpp]'"
)
_AT_ONCE = 1 << 20  # numbers that a thread quantises and compares
_FLOATS = ctypes.POINTER(ctypes.c_float)


def check_ggml(instead: str = "") -> None:
    """Refuse before the work when there is no ggml.

    Args:
        instead: what else can be done.

    Raises:
        FactorLLMError: saying how to get it.
    """
    if find_spec("xllamacpp") is None:
        raise FactorLLMError(f"{_MISSING}{instead}")
    _library()


def round_trip(name: str, tensor: np.ndarray, kind: Type) -> np.ndarray:
    """A tensor (..., d), fp32, quantised without importance weights and dequantised: fp32, of the same shape.

    Raises:
        FactorLLMError: as `quantize`.
    """
    back = np.empty(tensor.shape, np.float32)
    quantize(name, tensor, kind, None, back)
    return back


def quantize(
    name: str, tensor: np.ndarray, kind: Type, importance: np.ndarray | None, back: np.ndarray | None = None
) -> np.ndarray:
    """A tensor in a type of blocks, on all cores.

    Args:
        name: for messages.
        tensor: (..., d), fp32, d a multiple of the type's block.
        kind: the type.
        importance: what the squared error of each column counts, (n, d) or (1, d), fp32, positive; a row for each of
            the n matrices of a tensor of three dimensions. None for ggml's own choice.
        back: filled with what comes out again, fp32, of the tensor's shape.

    Returns:
        uint8, (..., bytes of a row).

    Raises:
        FactorLLMError: when a row does not come out as what was put in.
    """
    typical = float(np.sqrt(np.square(tensor, dtype=np.float64).sum(-1).mean()))
    out = None if back is None else back.reshape(-1, *tensor.shape[-2:])

    def look(number: int, rows: slice, given: np.ndarray, made: np.ndarray) -> None:
        again = _dequantize_rows(made, kind, tensor.shape[-1])
        refuse_lost(name, given, again, kind.name, typical)
        if out is not None:
            out[number, rows] = again

    return _quantized(tensor, kind, importance, look)


def quantize_loosely(tensor: np.ndarray, kind: Type, importance: np.ndarray | None) -> np.ndarray:
    """As `quantize`, of what somebody else looks at: rows may come out as others than what was put in."""
    return _quantized(tensor, kind, importance, lambda *_: None)


def _quantized(
    tensor: np.ndarray,
    kind: Type,
    importance: np.ndarray | None,
    look: Callable[[int, slice, np.ndarray, np.ndarray], None],
) -> np.ndarray:
    """A tensor on all cores, piece by piece.

    Args:
        look: is shown each piece: the number of its matrix, its rows there, what was put in, and its bytes.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = tensor.shape[-1]
    matrices = np.ascontiguousarray(tensor, np.float32).reshape(-1, tensor.shape[-2], width)
    made = np.empty((*matrices.shape[:2], width // block * size), np.uint8)

    def work(piece: tuple[int, slice]) -> None:
        number, rows = piece
        weights = None if importance is None else importance[number if len(importance) > 1 else 0]
        _quantize_rows(matrices[number, rows], made[number, rows], kind, weights)
        look(number, rows, matrices[number, rows], made[number, rows])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(work, _pieces(matrices.shape)))
    return made.reshape(*tensor.shape[:-1], -1)


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Rows of one matrix each, few enough for a thread."""
    count = max(_AT_ONCE // shape[-1], 1)
    for number in range(shape[0]):
        for first in range(0, shape[1], count):
            yield number, slice(first, first + count)


def _quantize_rows(rows: np.ndarray, made: np.ndarray, kind: Type, weights: np.ndarray | None) -> None:
    given = None if weights is None else np.ascontiguousarray(weights, np.float32)
    _library().ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data_as(_FLOATS),
        made.ctypes.data_as(ctypes.c_void_p),
        0,
        rows.shape[0],
        rows.shape[1],
        None if given is None else given.ctypes.data_as(_FLOATS),
    )


def _dequantize_rows(made: np.ndarray, kind: Type, width: int) -> np.ndarray:
    back = np.empty((len(made), width), np.float32)
    undo = getattr(_library(), f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    undo(made.ctypes.data_as(ctypes.c_void_p), back.ctypes.data_as(_FLOATS), ctypes.c_int64(back.size))
    return back


@cache
def _library() -> ctypes.CDLL:
    """The functions of ggml. ctypes lets other threads run while one of them does."""
    spec = find_spec("xllamacpp")  # only located: its own module starts what is not needed here
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise FactorLLMError(_MISSING)
    files = [path for place in places for path in Path(place).glob("xllamacpp*")]
    found = sorted(path for path in files if path.suffix in (".so", ".pyd"))
    try:
        library = ctypes.CDLL(str(found[0]))
        quantize_chunk = library.ggml_quantize_chunk
    except (IndexError, OSError, AttributeError):
        raise FactorLLMError(
            "this xllamacpp does not give away ggml's quantiser; pip install -U xllamacpp, or write f16 and run "
            "llama-quantize"
        ) from None
    integers = [ctypes.c_int64] * 3
    quantize_chunk.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, *integers, _FLOATS]
    quantize_chunk.restype = ctypes.c_size_t
    return library
