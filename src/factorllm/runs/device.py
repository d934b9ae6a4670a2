"""The device that a run computes on."""

from __future__ import annotations

import torch

from factorllm.errors import FactorLLMError, refusing


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast on a device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def fast_products(device: torch.device, bearable: bool = True) -> torch.autocast:
    """Matrix products in bfloat16 where they are fast, and its rounding can be borne."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bearable and has_bfloat16(device))


def usable_device(device: str) -> str:
    """A device that this machine has, `auto` decided.

    Raises:
        FactorLLMError: when it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"device {device!r}", "use --device cpu"):
        if torch.empty(0, device=device).is_meta:
            raise FactorLLMError("device 'meta' computes nothing; use --device cpu")
    return device
