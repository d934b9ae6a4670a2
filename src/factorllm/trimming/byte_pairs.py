"""What a byte pair encoding makes tokens of, and whether it can write every text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from factorllm.errors import FactorLLMError

_SPACE = "▁"
"""SentencePiece's mark of a space."""


class BytePairs:
    """The byte pair encoding of a tokenizer.

    Args:
        tokenizer: what `tokenizer.json` says.
        label: the model, for messages.

    Attributes:
        ids: of all tokens that merges make, and of those that they are made of.
        bytes: tokens without which some text could not be written.

    Raises:
        FactorLLMError: when the tokenizer is of another kind, or has no tokens for single bytes.
    """

    def __init__(self, tokenizer: Mapping[str, Any], label: str):
        model = tokenizer["model"]
        if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise FactorLLMError(
                f"the tokenizer of {label} is no byte pair encoding of bytes (it is {model.get('type')}), of which "
                "alone a part can be taken; use the model with its whole vocabulary"
            )
        self.ids: dict[str, int] = model["vocab"]
        self._rank = {tuple(pair): rank for rank, pair in reversed(list(enumerate(model["merges"])))}
        self.bytes = self._bytes(tokenizer, label)

    def _bytes(self, tokenizer: Mapping[str, Any], label: str) -> set[str]:
        if tokenizer["model"].get("byte_fallback"):
            found = {f"<0x{byte:02X}>" for byte in range(256)}
            needed = found
        elif "ByteLevel" in _kinds([tokenizer.get("pre_tokenizer"), tokenizer.get("normalizer")]):
            found = {token for token in self.ids if len(token) == 1}
            # SmolLM2 has none for bytes that it never met. They are lost with all of its tokens too.
            needed = set("".join(self.ids.keys() - {token["content"] for token in tokenizer["added_tokens"]}))
        else:
            found, needed = set(), set(self.ids)
        if not needed <= found & self.ids.keys():
            raise FactorLLMError(
                f"the tokenizer of {label} has no tokens for single bytes, so text of tokens that are left out would "
                "be lost; use the model with its whole vocabulary"
            )
        if tokenizer["model"].get("byte_fallback") and _SPACE in self.ids:
            found.add(_SPACE)  # written as bytes it would not become a space again
        return found

    def made_of(self, token: str) -> Iterator[str]:
        """The tokens that are made on the way from single characters to `token`, itself the last.

        A text in which a token stands goes this way too: nothing outside of it is merged with a part of it.
        """
        parts = list(token)
        yield from (part for part in parts if part in self.ids)
        while len(parts) > 1:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in pairwise(parts)]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == len(self._rank):
                break  # no merges make it: a word that is taken whole, or one that is never made
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            yield parts[place]
        yield token


def _kinds(part: object) -> set[str]:
    """The types of all steps in a part of `tokenizer.json`."""
    if isinstance(part, list):
        return set().union(*map(_kinds, part)) if part else set()
    if not isinstance(part, dict):
        return set()
    own = {part["type"]} if isinstance(part.get("type"), str) else set()
    return own | _kinds(list(part.values()))
