"""Perplexity on packed token sequences."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError

_LOGITS_AT_ONCE = 1 << 26  # elements: 256 MiB in fp32
_LOSSES_AT_ONCE = 64  # positions
_LARGEST_LOSS = math.log(sys.float_info.max)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: Tensor, tick: Callable[[int], None] = lambda sequences: None) -> float:
    """exp of the mean next-token loss over all positions but the first of each sequence; inf where that is too large.

    Args:
        tokens: (sequences, length), int64.
        tick: called with the number of sequences after each batch.
    """
    batch = max(_LOGITS_AT_ONCE // (tokens.shape[1] * model.config.vocab_size), 1)
    total = 0.0
    for rows in tokens.split(batch):
        total += _loss_on(model, rows.to(model.device))
        tick(len(rows))
    return from_loss(total / (tokens.shape[0] * (tokens.shape[1] - 1)))


def _loss_on(model: PreTrainedModel, rows: Tensor) -> float:
    """Summed; the logits are gone before those of the next batch come."""
    said = model(rows, use_cache=False).logits
    return sum(_summed_loss(logits[:-1], row[1:]) for logits, row in zip(said, rows, strict=True))


def from_loss(loss: float) -> float:
    """exp of a loss; inf where that is too large."""
    return math.exp(loss) if loss < _LARGEST_LOSS else loss * math.inf


def _summed_loss(logits: Tensor, following: Tensor) -> float:
    """Of (n, vocabulary) logits, and the n tokens that are there; a few at a time, for the loss copies its logits."""
    pieces = zip(logits.split(_LOSSES_AT_ONCE), following.split(_LOSSES_AT_ONCE), strict=True)
    return sum(cross_entropy(piece.float(), tokens, reduction="sum").item() for piece, tokens in pieces)


def refuse_infinite(perplexities: dict[str, float], instead: str) -> None:
    """Refuse perplexities that are no finite numbers.

    Args:
        perplexities: by model.
        instead: what to do.

    Raises:
        FactorLLMError: for the first of them.
    """
    for name, value in perplexities.items():
        if not math.isfinite(value):
            raise FactorLLMError(
                f"the perplexity of the {name} model is {value}, though its weights are finite: its activations are "
                f"too large to be computed with; {instead}"
            )
