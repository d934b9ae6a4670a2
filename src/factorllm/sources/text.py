"""Calibration text: local files, a `datasets` id, or text sampled from the model itself."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError
from factorllm.settings import Settings
from factorllm.sources.digest import digest_of
from factorllm.sources.sampling import sample_from_model

TEXT_KEYS = ("text", "content", "extract", "article", "document")
"""Keys under which a record's text is looked for, in this order."""


@dataclass(frozen=True)
class CalibrationText:
    """Packed token sequences: one part to calibrate on, one held out for the before/after perplexity.

    Attributes:
        calibration: (sequences, length), int64.
        held_out: (sequences, length), int64; no document is in both parts.
        origin: where the text came from, in words for the model card.
    """

    calibration: torch.Tensor
    held_out: torch.Tensor
    origin: str

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of both token arrays, in hexadecimal."""
        digest = xxhash.xxh3_128()
        for tokens in (self.calibration, self.held_out):
            digest.update(str(tuple(tokens.shape)).encode())
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()


def read_calibration_text(
    text: str | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    load_model: Callable[[], PreTrainedModel] | None = None,
    at_least: int | None = None,
) -> CalibrationText:
    """Pack the calibration and the held-out tokens of `settings` into sequences of its length.

    Documents are shuffled by its seed and joined with the tokenizer's end token. The sequence in which the two parts
    meet is dropped, so that no document is in both.

    Args:
        text: a .txt/.jsonl/.json/.parquet file, a `datasets` id, or None to sample from the model itself.
        load_model: called when text must be sampled; needed only then.
        at_least: so many calibration tokens will do where the text has no more; None wants all of them.

    Raises:
        FactorLLMError: when the text cannot be read or is too short.
    """
    length, seed = settings.length, settings.seed
    held_out = max(settings.held_out_tokens // length, 1)
    most, calibration = (max(wanted // length, 1) for wanted in (settings.tokens, at_least or settings.tokens))
    needed = held_out + 1 + calibration
    if text is None:
        packed = sample_from_model(load_model(), tokenizer, held_out + 1 + most, length, seed)
    else:
        documents = list(read_documents(text))
        random.Random(seed).shuffle(documents)
        packed = pack(documents, tokenizer, held_out + 1 + most, length)
    if len(packed) < needed:
        missing = needed - len(packed)
        raise FactorLLMError(
            f"the text is too short: it makes {len(packed)} sequences of {length} tokens, but {calibration} to "
            f"learn from and {held_out + 1} held out are needed; give more text"
            + (f", or take at least {missing * length} off --tokens" if missing < calibration else "")
        )
    return CalibrationText(packed[held_out + 1 :], packed[:held_out], text_origin(text))


def text_origin(text: str | None) -> str:
    """Where the text came from, in words for the model card."""
    return "sampled from the dense model itself" if text is None else public_name(text)


def public_name(path_or_id: str) -> str:
    """A name to publish: the last part of a local path, or the hub id as it is."""
    path = os.path.abspath(os.path.expanduser(path_or_id))  # `.` has no name of its own
    # Bytes of a name that are no UTF-8 could not be written into a card.
    return os.fsencode(os.path.basename(path)).decode(errors="replace") if os.path.exists(path) else path_or_id


def file_digest(text: str | None) -> str | None:
    """xxh3-128 of a local text file, in hexadecimal; None for text that is no local file."""
    if text is None or not Path(text).is_file():
        return None
    return digest_of([Path(text)])


def read_documents(text: str) -> Iterator[str]:
    """Documents of a local file or a `datasets` id; empty ones are left out.

    A .txt file holds documents separated by blank lines. A .json file holds a list, or a mapping whose values are
    the records; records are strings or mappings with one of `TEXT_KEYS`.

    Raises:
        FactorLLMError: when the text cannot be read.
    """
    path = Path(text).expanduser()
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix in readers:
        try:
            yield from _texts(readers[path.suffix](path), text)
        except FileNotFoundError:
            raise FactorLLMError(f"no such text file: {text}; check the path") from None
        except (OSError, ValueError) as error:  # UnicodeDecodeError, JSONDecodeError and ArrowInvalid are ValueErrors
            raise FactorLLMError(f"text file {text} cannot be read: {' '.join(str(error).split())[:200]}") from None
    elif path.exists():
        raise FactorLLMError(f"{text} is not a kind of text that is read; use {', '.join(readers)} or a dataset id")
    else:
        yield from _texts(_read_dataset(text), text)


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> torch.Tensor:
    """Join tokenised documents with the end token and cut them: at most (sequences, length), int64."""
    end = tokenizer.eos_token_id
    if end is None:
        raise FactorLLMError("the tokenizer has no end token to put between documents; set eos_token in its config")
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        stream.append(end)
        if len(stream) >= sequences * length:
            break
    whole = min(len(stream) // length, sequences)
    return torch.tensor(stream[: whole * length], dtype=torch.int64).view(whole, length)


def _texts(records: Iterable[object], text: str) -> Iterator[str]:
    for record in records:
        if isinstance(record, dict):
            key = next((key for key in TEXT_KEYS if isinstance(record.get(key), str)), None)
            if key is None:
                raise FactorLLMError(
                    f"{text}: a record has the keys {', '.join(map(str, record))}, none of {', '.join(TEXT_KEYS)}; "
                    "rename the one that holds the text"
                )
            record = record[key]
        if not isinstance(record, str):
            raise FactorLLMError(f"{text}: a record is neither a string nor a mapping with a text; see the README")
        if record.strip():
            yield record


def _read_txt(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    yield "".join(lines)


def _read_json(path: Path) -> Iterable[object]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content.values() if isinstance(content, dict) else content


def _read_jsonl(path: Path) -> Iterator[object]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _read_parquet(path: Path) -> Iterator[object]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _read_dataset(name: str) -> Iterator[object]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the hub client and `datasets` raise many unrelated classes
        raise FactorLLMError(
            f"no such text: {name} is no local file, and no data set of that name could be loaded "
            f"({' '.join(str(error).split())[:200]}); give a .txt, .jsonl, .json or .parquet file"
        ) from None
    yield from rows
