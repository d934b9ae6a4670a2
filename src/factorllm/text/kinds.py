"""Calibration text of K kinds, which are found among its documents: each sequence holds documents of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError
from factorllm.runs.settings import Settings
from factorllm.text.calibration import CalibrationText, say_notes, text_origin
from factorllm.text.documents import Documents
from factorllm.text.intuition import Intuition
from factorllm.text.parts import DocumentParts, sequences_of

_CHARACTERS = 8  # that are read of a text for each token that is wanted of it: twice what a token has in English
_DOCUMENTS = 100_000  # that are read at most


class _Chosen(Documents):
    """Some of the documents of a text."""

    def __init__(self, text: str, documents: list[str]):
        super().__init__(text)
        self._chosen = documents

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)


def read_text_of_kinds(
    text: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, kinds: int, console: Console | None = None
) -> CalibrationText:
    """As `read_calibration_text`, each sequence of one kind, and each kind in its share of the text.

    Kinds are clusters of documents (`intuition.Intuition.from_documents`), each document counted by its length. The
    sequences are shuffled, so that any run of them has all kinds.

    Raises:
        FactorLLMError: when the text cannot be read, or a kind is too short for a sequence to learn from and one to
            measure on.
    """
    documents = _read(text, tokenizer, settings)
    if len(documents) < kinds:
        raise FactorLLMError(
            f"{text} has {len(documents)} documents, in which {kinds} kinds cannot be found; give more of them, or a "
            "smaller K"
        )
    sizes = [len(document) for document in documents]
    intuition = Intuition.from_documents(documents, kinds, settings.seed, weights=sizes)
    picks = [int(intuition.probabilities(document).argmax()) for document in documents]
    parts = []
    for kind in range(kinds):
        chosen = [document for document, pick in zip(documents, picks, strict=True) if pick == kind]
        share = sum(map(len, chosen)) / sum(sizes)
        parts.append(_read_kind(text, chosen, tokenizer, settings, kind, share, console))
    held_out, calibration, cuts = zip(*parts, strict=True)
    held_out, held_out_kinds = _shuffled(held_out, settings.seed)
    calibration, calibration_kinds = _shuffled(calibration, settings.seed)
    cut = any(cuts)
    origin = text_origin(text, cut)
    return CalibrationText(calibration, held_out, origin, cut, kinds=calibration_kinds, held_out_kinds=held_out_kinds)


def _read(text: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[str]:
    """As many documents as the tokens may be of, each once."""
    wanted, found = _CHARACTERS * (settings.tokens + settings.held_out_tokens), {}
    for document in islice(Documents(text, tokenizer), _DOCUMENTS):
        if document not in found:
            found[document] = True
            wanted -= len(document)
        if wanted < 0:
            break
    return list(found)


def _read_kind(
    text: str,
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    kind: int,
    share: float,
    console: Console | None,
) -> tuple[Tensor, Tensor, bool]:
    """What is held out of a kind, what is learned from, and whether both are cut from one document."""
    parts = DocumentParts(_Chosen(text, documents), tokenizer, settings.length, settings.seed)
    held_out = parts.hold_out(sequences_of(int(share * settings.held_out_tokens), settings.length))
    calibration = parts.take(sequences_of(int(share * settings.tokens), settings.length))
    say_notes(parts, console)
    if not len(calibration):
        raise FactorLLMError(
            f"kind {kind} of the text, {len(documents)} documents, is too short: beside what is held out it makes no "
            f"sequence of {settings.length} tokens to learn from; give more text, or a smaller K"
        )
    return held_out, calibration, parts.cut


def _shuffled(of_kinds: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Sequences of all kinds, (n, length), and the kind of each, (n,)."""
    kinds = torch.cat([torch.full((len(sequences),), kind) for kind, sequences in enumerate(of_kinds)])
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    return torch.cat(of_kinds)[order], kinds[order]
