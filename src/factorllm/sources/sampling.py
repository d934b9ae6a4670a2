"""Text sampled from a model itself: general text of the kind that it was trained on, which is what it is to keep.

Data-free distillation does the same (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError
from factorllm.evaluate.generate import next_logits

BATCH = 128
"""Sequences that are sampled at once."""

_BETWEEN_DOCUMENTS = "<|endoftext|>"  # of most vocabularies; a chat model's own end token begins a conversation


def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    length: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
    temperature: float = 1.0,
) -> Tensor:
    """Sample from the model, each sequence as if a document began: (sequences, length), int64.

    A sampled end token does not stop a sequence: the next document follows it, as in packed text.

    Args:
        temperature: what the logits are divided by.
        advance: called with the number of tokens of each step.
    """
    model.set_attn_implementation("eager")  # for one new token a sequence it is the faster one, the more the longer
    generator = torch.Generator().manual_seed(seed)
    start = start_token(tokenizer)
    sizes = batch_sizes(sequences)
    return torch.cat([_sample(model, start, size, length, generator, advance, temperature) for size in sizes])


def batch_sizes(sequences: int) -> list[int]:
    """Sequences in each batch that so many are sampled in."""
    return [min(BATCH, sequences - done) for done in range(0, sequences, BATCH)]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after which a document begins: the one between documents, else the tokenizer's first or end token.

    Raises:
        FactorLLMError: when it has none of them.
    """
    between = tokenizer.get_vocab().get(_BETWEEN_DOCUMENTS)
    for token in (between, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise FactorLLMError(
        "the tokenizer has no token to begin a document with; set bos_token or eos_token in its config"
    )


@torch.inference_mode()
def _sample(
    model: PreTrainedModel,
    start: int,
    sequences: int,
    length: int,
    generator: torch.Generator,
    advance: Callable[[int], None],
    temperature: float,
) -> Tensor:
    cache, last, drawn = DynamicCache(config=model.config), torch.full((sequences, 1), start), []
    for _ in range(length):
        logits = next_logits(model, last, cache)
        # One random number for each row: `torch.multinomial` draws one for each token of the vocabulary, which takes
        # two thirds as long as the model.
        mass = (logits.float() / temperature).softmax(-1).cpu().cumsum(-1)
        point = torch.rand(sequences, 1, generator=generator) * mass[:, -1:]
        last = torch.searchsorted(mass, point).clamp_max(mass.shape[-1] - 1)
        drawn.append(last)
        advance(sequences)
    return torch.cat(drawn, dim=1)
