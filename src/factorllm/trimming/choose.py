"""Which tokens of a vocabulary stay."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.wrappers import Wrapper
from factorllm.errors import FactorLLMError
from factorllm.trimming import VOCABULARY
from factorllm.trimming.byte_pairs import BytePairs


def choose_tokens(pairs: BytePairs, counts: Tensor, always: Iterable[int], size: int) -> list[int]:
    """The tokens that stay: those of a text, the most frequent first, then those of the lowest ids, which are the most
    frequent of what the tokenizer was made from; each with the tokens that it is merged from.

    Text of which all tokens stay is cut as before: of the merges that the whole vocabulary would do, in the same order,
    none is missing.

    Args:
        counts: how often each token is in the text, (vocabulary,), int64.
        always: ids that stay in any case, beside the single bytes.
        size: how many stay.

    Returns:
        Ids, ascending.

    Raises:
        FactorLLMError: when `size` is too small for what must stay.
    """
    kept = {*always, *(pairs.ids[token] for token in pairs.bytes)}
    if len(kept) > size:
        raise FactorLLMError(
            f"single bytes and special tokens alone are {len(kept):,}; choose a larger --vocabulary than {size:,}"
        )
    token_of = {index: token for token, index in pairs.ids.items()}
    for index in counts.argsort(descending=True, stable=True).tolist():  # equal counts in the order of ids
        if len(kept) == size:
            break
        if index in token_of:
            needed = {pairs.ids[token] for token in pairs.made_of(token_of[index])}
            if len(kept | needed) <= size:
                kept |= needed
    return sorted(kept)


def check_trim(model: str, config: PreTrainedConfig, wrapper: Wrapper | None, size: int) -> None:
    """Refuse a model that sees images, and a vocabulary of no token, or of which nothing is left out.

    Args:
        wrapper: what is round the dense model, if anything is.
        size: tokens that are to stay.
    """
    if wrapper:
        raise FactorLLMError(
            f"{model} takes images too, by tokens of their own; only models of text alone are trimmed: give its text "
            "model"
        )
    if size < 1:
        raise FactorLLMError(f"a vocabulary of {size:,} tokens is none; choose a --vocabulary such as {VOCABULARY}")
    if size >= (tokens := config.vocab_size):
        raise FactorLLMError(f"the model has {tokens:,} tokens, so none is left out; choose a smaller --vocabulary")
