"""Text sampled from a model itself: general text of the kind that it was trained on, which is what it is to keep.

Data-free distillation does the same (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.generate import next_logits
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.memory import reuse_freed_memory
from factorllm.text.conversations import as_text

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
    opening: list[int] | None = None,
) -> Tensor:
    """Sample from the model, each sequence as if a document began: (sequences, length), int64.

    A sampled end token does not stop a sequence: the next document follows it, as in packed text.

    Args:
        temperature: what the logits are divided by.
        advance: called with the number of tokens of each step.
        opening: what each sequence goes on from, and does not hold; the start of a document unless given.
    """
    reuse_freed_memory()  # each step leaves a cache behind
    model.set_attn_implementation("eager")  # for one new token a sequence it is the faster one, the more the longer
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([start_token(tokenizer)] if opening is None else opening)
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text, the model's end among them."""
    return {*tokenizer.all_special_ids, *(i for i, added in tokenizer.added_tokens_decoder.items() if added.special)}


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens up to where a user begins to speak, by the tokenizer's chat template.

    A chat model goes on with a question of its own and its answer (Magpie, arXiv 2406.08464).

    Raises:
        FactorLLMError: when it has no chat template, or one that fails or does not hold what users say.
    """
    if not tokenizer.chat_template:
        raise FactorLLMError(
            "the tokenizer has no chat template, so the model does not know how a conversation begins; leave --chat out"
        )
    said = "FactorLLM"
    with refusing("the chat template", "leave --chat out"):
        conversation = as_text(tokenizer, [{"role": "user", "content": said}])
    before, found, _ = conversation.partition(said)
    opening = tokenizer(before, add_special_tokens=False).input_ids
    if not found or not opening:
        raise FactorLLMError("the chat template puts nothing before what a user says; leave --chat out")
    return opening


@torch.inference_mode()
def _sample(
    model: PreTrainedModel,
    start: Tensor,
    sequences: int,
    length: int,
    generator: torch.Generator,
    advance: Callable[[int], None],
    temperature: float,
) -> Tensor:
    cache, last, drawn = DynamicCache(config=model.config), start.expand(sequences, -1), []
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
