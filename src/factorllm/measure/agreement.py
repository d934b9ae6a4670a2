"""How far a student's next tokens are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Agreement:
    """Means over positions.

    Attributes:
        kl: KL(dense || student) of the next-token distributions, in nats; None where an engine does not give them.
        top_1: share of positions where both models have the same most likely token.
    """

    kl: float | None
    top_1: float


@torch.inference_mode()
def agreement(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    tick: Callable[[int], None] = lambda sequences: None,
) -> Agreement:
    """Compare two models on the same text.

    Args:
        tokens: (sequences, length), int64.
        tick: called with the number of sequences after each batch.
    """
    kl = same = 0.0
    for rows in tokens.split(1):
        wanted = dense(rows.to(dense.device), use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        found = student(rows.to(student.device), use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        kl += kl_div(found, wanted, log_target=True, reduction="sum").item()
        same += (wanted.argmax(-1) == found.argmax(-1)).sum().item()
        tick(len(rows))
    return Agreement(kl / tokens.numel(), same / tokens.numel())
