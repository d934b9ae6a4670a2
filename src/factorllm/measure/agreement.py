"""How far a student's next tokens are from the dense model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from factorllm.measure.perplexity import from_loss


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
def on_text(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    tick: Callable[[int], None] = lambda sequences: None,
) -> tuple[dict[str, float], Agreement]:
    """The perplexities of two models, as `perplexity` has them, and their agreement; each reads the text once.

    Args:
        tokens: (sequences, length), int64.
        tick: called with the number of sequences after each batch.
    """
    kl = same = 0.0
    losses = {"student": 0.0, "dense": 0.0}
    for rows in tokens.split(1):
        wanted, found = (
            model(rows.to(model.device), use_cache=False).logits[0].float().log_softmax(-1)
            for model in (dense, student)
        )
        for name, said in (("student", found), ("dense", wanted)):
            losses[name] -= said[:-1].gather(1, rows[0, 1:, None].to(said.device)).sum(dtype=torch.float64).item()
        kl += kl_div(found, wanted, log_target=True, reduction="sum").item()
        same += (wanted.argmax(-1) == found.argmax(-1)).sum().item()
        tick(len(rows))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    perplexities = {name: from_loss(loss / predicted) for name, loss in losses.items()}
    return perplexities, Agreement(kl / tokens.numel(), same / tokens.numel())
