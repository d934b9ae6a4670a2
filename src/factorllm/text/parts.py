"""A text in parts that share no document: what is measured on is never part of what was fitted to."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.opening import opening_of
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.settings import Settings
from factorllm.text.documents import Documents, local_path
from factorllm.text.sampling import sample_from_model

_SHUFFLED_AT_ONCE = 1000  # documents of a data set, which is read only as far as it is needed
_PASSED_OVER = 16  # documents too long to hold out, before the shortest of them is held out after all


class Parts(ABC):
    """A text in packed token sequences, (n, length), int64. Each call hands out what no call before it did.

    Each sequence begins with what the tokenizer puts before a text, as all does that a model is given in use.

    Attributes:
        cut: whether parts had to be cut out of one document, because the text has no more of them.
    """

    cut: bool = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        self._opening = opening_of(tokenizer)
        self._length = length - len(self._opening)  # of the text in a sequence

    @abstractmethod
    def hold_out(self, sequences: int, purpose: str = "held out") -> Tensor:
        """So many sequences of documents that no other part has.

        Raises:
            FactorLLMError: when the text is too short.
        """

    @abstractmethod
    def take(self, sequences: int) -> Tensor:
        """So many sequences, or all that are left. They may begin in the document in which the last such part ends."""

    def notes(self) -> list[str]:
        """What a user should know of how the text was read, a sentence each."""
        return []

    def _packed(self, tokens: list[int]) -> Tensor:
        """All whole sequences: (n, opening and length), int64."""
        whole = len(tokens) // self._length
        return self._opened(torch.tensor(tokens[: whole * self._length], dtype=torch.int64).view(whole, self._length))

    def _opened(self, rows: Tensor) -> Tensor:
        return torch.cat([torch.tensor(self._opening, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def sequences_of(tokens: int, length: int) -> int:
    """Whole sequences in so many tokens, but at least one."""
    return max(tokens // length, 1)


def open_text(
    text: str | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    load_model: Callable[[], PreTrainedModel] | None = None,
) -> Parts:
    """A text, ready to be handed out part by part, by the length and the seed of `settings`.

    The parts are the same for the same text and settings, whatever parts are asked for after them.

    Args:
        text: a .txt/.jsonl/.json/.parquet file, a `datasets` id, or None to sample from the model itself.
        load_model: called when text must be sampled; needed only then.

    Raises:
        FactorLLMError: when the tokenizer has no end token to put between documents.
    """
    if text is None:
        return _SampledParts(load_model, tokenizer, settings.length, settings.seed)
    return DocumentParts(Documents(text, tokenizer), tokenizer, settings.length, settings.seed)


class _SampledParts(Parts):
    """Each sequence is a text of its own, and each part has a seed of its own."""

    def __init__(
        self, load_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
    ):
        super().__init__(tokenizer, length)
        self._load_model, self._tokenizer, self._seed = load_model, tokenizer, seed
        self._parts = 0

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self._load_model()

    def take(self, sequences: int) -> Tensor:
        seed = self._seed * 1_000_003 + self._parts
        self._parts += 1
        if not sequences:
            return self._packed([])
        opening = self._opening or None
        rows = sample_from_model(self._model, self._tokenizer, sequences, self._length, seed, opening=opening)
        return self._opened(rows)

    def hold_out(self, sequences: int, purpose: str = "held out") -> Tensor:
        return self.take(sequences)


class DocumentParts(Parts):
    """Documents that are shuffled, and joined with the tokenizer's end token."""

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        super().__init__(tokenizer, length)
        self._text, self._documents = documents.text, documents
        self._repeated = 0
        at_once = None if local_path(self._text) else _SHUFFLED_AT_ONCE
        shuffled = _shuffled(self._distinct(documents), random.Random(seed), at_once)
        self._unread = map(_encoder(tokenizer), shuffled)
        self._waiting: deque[list[int]] = deque()  # documents that were read, but belong to no part yet
        self._rest: list[int] = []  # of the document in which `take` ended

    def hold_out(self, sequences: int, purpose: str = "held out") -> Tensor:
        wanted = sequences * self._length
        held, long = [], []
        while len(held) < wanted and len(long) < _PASSED_OVER and (document := self._next()):
            # The rest of the last document is lost, so one with a long rest is left to `take`.
            if len(held) + len(document) > 2 * wanted:
                long.append(document)
            else:
                held += document
        while len(held) < wanted and long:
            held += long.pop(min(range(len(long)), key=lambda number: len(long[number])))
        self._waiting.extendleft(reversed(long))
        if len(held) < wanted:
            held += self._cut_rest(wanted - len(held))
        elif not self._more():
            self._keep_rest(held[wanted:])
        if len(held) < wanted:
            raise FactorLLMError(
                f"the text is too short: it has {len(held)} of the {wanted} tokens that must be {purpose}; "
                "give more text"
            )
        return self._packed(held[:wanted])

    def take(self, sequences: int) -> Tensor:
        wanted = sequences * self._length
        taken, self._rest = self._rest, []
        while len(taken) < wanted and (document := self._next()):
            taken += document
        self._rest = taken[wanted:]
        return self._packed(taken[:wanted])

    def notes(self) -> list[str]:
        found = []
        if self._documents.left_out:
            found.append(f"{self._documents.left_out:,} records of {self._text} hold no text and were left out")
        if self._repeated:
            found.append(f"{self._repeated:,} documents of {self._text} repeat others and were left out")
        if self.cut:
            found.append(
                f"{self._text} has too few documents: parts of one and the same are learned from and measured on, so "
                "the student may be worse on other text than measured; give more documents, separated by blank lines"
            )
        return found

    def _next(self) -> list[int] | None:
        return self._waiting.popleft() if self._waiting else next(self._unread, None)

    def _more(self) -> bool:
        """Whether anything is left."""
        if not self._rest and (document := self._next()):
            self._waiting.appendleft(document)
        return bool(self._rest or self._waiting)

    def _keep_rest(self, rest: list[int]) -> None:
        """Leave the end of a document, all but a sequence, to `take`: there is nothing else that it could give."""
        self._rest = rest[self._length :]
        self.cut = self.cut or bool(self._rest)

    def _cut_rest(self, tokens: int) -> list[int]:
        """So many tokens of the document in which `take` ended, with a sequence lost on either side."""
        rest = self._rest[self._length :]
        self.cut = self.cut or bool(rest)
        self._rest = rest[tokens + self._length :]
        return rest[:tokens]

    def _distinct(self, documents: Iterable[str]) -> Iterator[str]:
        """Each document once: a text that holds one twice would have it in two parts."""
        seen: set[bytes] = set()
        for document in documents:
            digest = xxhash.xxh3_128_digest(document.strip().encode())
            if digest in seen:
                self._repeated += 1
            else:
                seen.add(digest)
                yield document


def _shuffled(documents: Iterator[str], chooser: random.Random, at_once: int | None) -> Iterator[str]:
    """Documents in random order; `at_once` of them are in memory, None for all."""
    held = list(islice(documents, at_once))
    for document in documents:
        place = chooser.randrange(len(held))
        yield held[place]
        held[place] = document
    chooser.shuffle(held)
    yield from held


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """What makes a document's tokens, the end token the last of them."""
    end = tokenizer.eos_token_id
    if end is None:
        raise FactorLLMError("the tokenizer has no end token to put between documents; set eos_token in its config")
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token))

    def encode(document: str) -> list[int]:
        # In text that was formatted for the model special tokens are meant; in all other `</s>` is four letters.
        bare = document.strip()
        formatted = bare.startswith(special) or bare.endswith(special)
        with refusing(f"the document that begins with {bare[:40]!r}", "the tokenizer cannot take it: leave it out"):
            tokens = tokenizer(
                document, add_special_tokens=False, verbose=False, split_special_tokens=not formatted
            ).input_ids
        return tokens if formatted and tokens[-1:] == [end] else [*tokens, end]

    return encode
