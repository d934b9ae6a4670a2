"""Running a dense model over a text to see what passes its modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


@torch.inference_mode()
def run_watched(model: PreTrainedModel, tokens: Tensor, hooks: Iterable[RemovableHandle]) -> None:
    """Run the layers of `model` over tokens (sequences, length), a sequence at a time, and remove the hooks."""
    try:
        for rows in tokens.split(1):
            model.model(rows.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
