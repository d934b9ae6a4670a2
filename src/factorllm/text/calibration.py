"""Calibration text: one part to calibrate on, one held out, from a local file, a `datasets` id, or the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError
from factorllm.runs.digest import digest_of
from factorllm.runs.given import name_of
from factorllm.runs.settings import Settings
from factorllm.text.documents import kind_of, local_path
from factorllm.text.parts import Parts, open_text, sequences_of


@dataclass(frozen=True)
class CalibrationText:
    """Packed token sequences: one part to calibrate on, one held out for the before/after perplexity.

    Attributes:
        calibration: (sequences, length), int64.
        held_out: (sequences, length), int64; no document is in both parts, unless they are `cut`.
        origin: where the text came from, in words for the model card.
        cut: whether both parts are of one document, because the text has no other.
        kinds, held_out_kinds: the kind of each sequence, (sequences,), int64, where kinds were looked for.
    """

    calibration: Tensor
    held_out: Tensor
    origin: str
    cut: bool = False
    kinds: Tensor | None = None
    held_out_kinds: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of both token arrays, in hexadecimal."""
        digest = xxhash.xxh3_128()
        for tokens in (self.calibration, self.held_out):
            digest.update(str(tuple(tokens.shape)).encode())
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the origin, to be kept in a file."""
        tensors = {"calibration": self.calibration, "held_out": self.held_out, "cut": torch.tensor(self.cut)}
        if self.kinds is not None:
            tensors |= {"kinds": self.kinds, "held_out_kinds": self.held_out_kinds}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], text: str | None) -> CalibrationText:
        """What `tensors` gave for a text."""
        cut = bool(tensors["cut"])
        of_kinds = {name: tensors.get(name) for name in ("kinds", "held_out_kinds")}
        return cls(tensors["calibration"], tensors["held_out"], text_origin(text, cut), cut, **of_kinds)


def read_calibration_text(
    text: str | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    load_model: Callable[[], PreTrainedModel] | None = None,
    console: Console | None = None,
) -> CalibrationText:
    """Pack the calibration and the held-out tokens of `settings` into sequences of its length.

    Documents are shuffled by its seed and joined with the tokenizer's end token. The held-out part comes first, so it
    does not depend on the number of calibration tokens, and its documents are its own.

    Args:
        text: a .txt/.jsonl/.json/.parquet file, a `datasets` id, or None to sample from the model itself.
        load_model: called when text must be sampled; needed only then.
        console: where is said what was left out of the text.

    Raises:
        FactorLLMError: when the text cannot be read or is too short.
    """
    parts = open_text(text, tokenizer, settings, load_model)
    held_out = hold_out(parts, settings)
    wanted = sequences_of(settings.tokens, settings.length)
    calibration = parts.take(wanted)
    say_notes(parts, console)
    refuse_too_few(len(calibration), wanted, settings.length)
    return CalibrationText(calibration, held_out, text_origin(text, parts.cut), parts.cut)


def hold_out(parts: Parts, settings: Settings) -> Tensor:
    """The held-out part of a text: the first that is handed out of it."""
    return parts.hold_out(sequences_of(settings.held_out_tokens, settings.length))


def refuse_too_few(found: int, wanted: int, length: int) -> None:
    """Refuse a text that makes fewer sequences to learn from than are wanted."""
    if found < wanted:
        raise FactorLLMError(
            f"the text is too short: beside what is held out it makes {found} sequences of {length} tokens, but "
            f"{wanted} are needed to learn from; give more text"
            + (f", or take at least {(wanted - found) * length} off --tokens" if found else "")
        )


def say_notes(parts: Parts, console: Console | None) -> None:
    """Tell what a user should know of how the text was read."""
    for note in parts.notes() if console else ():
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def text_origin(text: str | None, cut: bool = False) -> str:
    """Where the text came from, in words for the model card."""
    origin = "sampled from the dense model itself" if text is None else public_name(text)
    return f"{origin} (held-out and calibration text are cut from one document)" if cut else origin


def public_name(path_or_id: str) -> str:
    """A name to publish: the last part of a local path, or the hub id as it is."""
    path = os.path.abspath(os.path.expanduser(path_or_id))  # `.` has no name of its own
    return name_of(Path(path)) if os.path.exists(path) else path_or_id


def text_identity(text: str | None) -> str | None:
    """What a text is known by: a local one by its content and how it is read, wherever it lies, others by their id."""
    return file_digest(text) or text


def file_digest(text: str | None) -> str | None:
    """xxh3-128 of a local text file and of how its name says it is read, in hexadecimal; None for text that is no local
    file."""
    path = local_path(text) if text else None
    return digest_of([path], kind_of(path.name).encode()) if path and path.is_file() else None
