"""The last look at what is written: a checkpoint holds what was computed, or it is not written at all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from factorllm.errors import FactorLLMError
from factorllm.runs.finite import is_finite

_LOST = 2.0**-6
"""Share of a tensor's norm that may be lost in a cast to float16, which loses numbers under 6e-8: a router that is
small would send tokens elsewhere. A number of normal size loses 2^-11 of itself, and in bfloat16 2^-9."""

_STEPS = {
    "F16": 1, "Q8_0": 127, "Q5_1": 1, "Q5_0": 16, "Q4_1": 1, "Q4_0": 8,
    "Q6_K": 3600, "Q5_K": 60, "Q4_K": 60, "Q3_K": 90, "IQ4_NL": 110, "IQ4_XS": 3500,
}  # fmt: skip
"""Types of GGUF files that hold float16 numbers, and how many of its steps a block reaches. ggml fits the steps of the
second row to a block, so theirs are a tenth below what the format has."""

_SPOILT = 0.75
"""Share of a row's norm that no quantisation loses unless something went wrong in it. 3 bits lose about 0.15."""

_WIDER = "use --dtype bfloat16, or float32, when it is factorized"


def as_stored(tensors: dict[str, Tensor], dtype: torch.dtype, spoilt: str) -> dict[str, Tensor]:
    """Tensors in the dtype that they are stored in. Every tensor that is written into a checkpoint comes through here.

    Args:
        spoilt: why a tensor may hold NaN or infinity already, and what to do instead.

    Raises:
        FactorLLMError: when a tensor holds NaN or infinity, or is not the same in that dtype but for rounding.
    """
    return {name: _stored(name, tensor, dtype, spoilt) for name, tensor in tensors.items()}


def refuse_unstorable(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Refuse tensors of a dense model that `as_stored` would refuse after the work.

    Raises:
        FactorLLMError: for the first of them.
    """
    for name, tensor in tensors:
        _stored(name, tensor, dtype, "")


def refuse_unquantisable(name: str, tensor: Tensor, kind: str) -> None:
    """Refuse a tensor for which the float16 numbers of a GGUF type would be infinite.

    Args:
        tensor: finite, fp32.
        kind: the type by gguf's name of it, `Q8_0`.

    Raises:
        FactorLLMError: for a tensor that is too large.
    """
    peak, most = _peak(tensor), _STEPS.get(kind, float("inf")) * torch.finfo(torch.float16).max
    if peak > most:
        raise FactorLLMError(
            f"tensor {name} reaches {peak:.5g}, and {kind} holds {most:.5g} at most, so the file would hold infinity; "
            "export with --type bf16, or f32"
        )


def refuse_lost(name: str, rows: np.ndarray, back: np.ndarray, kind: str, typical: float) -> None:
    """Refuse rows that a quantiser did not keep: numbers of a block that overflow, or fall under what float16 holds.

    Args:
        rows: (n, d), fp32.
        back: the same, quantised and dequantised.
        kind: the type by gguf's name of it.
        typical: the norm of a usual row of the tensor; of smaller rows nothing needs to be kept.

    Raises:
        FactorLLMError: for a tensor that would be another one.
    """
    if not kept_rows(rows, back, typical).all():
        raise FactorLLMError(
            f"tensor {name} does not come out of {kind} as it went in: its numbers, up to {np.abs(rows).max():.5g}, "
            "are too large, too small or too uneven for it; export with --type q8_0, or bf16"
        )


def kept_rows(rows: np.ndarray, back: np.ndarray, typical: float) -> np.ndarray:
    """Which rows (..., d) a quantiser kept, (...) bool; NaN is not kept either. Arguments as of `refuse_lost`."""
    lost = np.linalg.norm((back - rows).astype(np.float64), axis=-1)
    kept: np.ndarray = lost <= _SPOILT * np.maximum(np.linalg.norm(rows.astype(np.float64), axis=-1), typical)
    return kept


def _stored(name: str, tensor: Tensor, dtype: torch.dtype, spoilt: str) -> Tensor:
    if not is_finite(tensor):
        raise FactorLLMError(f"tensor {name} has come out with NaN or infinity in it: {spoilt}")
    stored, kind = tensor.to(dtype), str(dtype).removeprefix("torch.")
    if tensor.dtype == dtype:
        return stored
    if not is_finite(stored):
        raise FactorLLMError(
            f"tensor {name} reaches {_peak(tensor):.5g}, and {kind} holds {torch.finfo(dtype).max:.5g} at most, so the "
            f"checkpoint would hold infinity; {_WIDER}"
        )
    if dtype == torch.float16 and _lost(tensor, stored) > _LOST:
        raise FactorLLMError(
            f"tensor {name} holds numbers of {_peak(tensor):.1e} at most, of which {kind} keeps too few digits, so the "
            f"student would be another one; {_WIDER}"
        )
    return stored


def _peak(tensor: Tensor) -> float:
    """The largest size of a number, all of which are finite; 0 where there is none."""
    return max(abs(extreme.item()) for extreme in torch.aminmax(tensor)) if tensor.numel() else 0.0


def _lost(tensor: Tensor, stored: Tensor) -> float:
    """The share of a tensor's norm that is not in what is stored of it."""
    peak = _peak(tensor)
    if not peak:
        return 0.0
    whole = tensor.float() / peak  # squares of very small numbers would be 0
    return ((stored.float() / peak - whole).norm() / whole.norm()).item()
