"""Documents of the texts that users have: files of many makers, and `datasets` ids."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, refusing
from factorllm.text.conversations import as_text

TEXT_KEYS = ("text", "content", "extract", "article", "document")
"""Keys under which a record's text is looked for, in this order."""

CHAT_KEYS = ("messages", "conversations", "conversation")
"""Keys under which a record's conversation is looked for, when it has no text."""

_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, by the names that chat templates have for them
_HOPELESS = 1000  # records without a text, after which no data set is read further to find one
_SURROGATE = re.compile("[\ud800-\udfff]")
_INSTEAD = "save it as UTF-8, or fetch it again where it is damaged"


class Documents:
    """The documents of a local file or a `datasets` id, in its order, without those that are empty.

    A .txt file holds documents separated by blank lines. A .json file holds a list, a mapping whose values are the
    records, columns, or lines. Records are strings, or mappings with a text under one of `TEXT_KEYS` or a conversation
    under one of `CHAT_KEYS`. A file may be compressed: `.jsonl.gz`.

    Args:
        text: the path or the id, `NAME` or `NAME:CONFIGURATION`.
        tokenizer: whose chat template writes conversations.

    Attributes:
        left_out: records without a text that were met so far.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None):
        self.text, self.left_out = text, 0
        self._tokenizer, self._reason = tokenizer, ""

    def __iter__(self) -> Iterator[str]:
        """Read them, from the start.

        Raises:
            FactorLLMError: when the text cannot be read, or no record has a text.
        """
        self.left_out, found = 0, 0
        for record in _records(self.text):
            document = self._document(record)
            if document is None or not document.strip():
                self.left_out += 1
                self._reason = self._reason or f"its records have {_contents(record)}"
                if not found and self.left_out == _HOPELESS and local_path(self.text) is None:
                    break
            else:
                found += 1
                yield whole_characters(document)
        if self.left_out and not found:
            raise FactorLLMError(
                f"{self.text} holds no text: {self._reason}, none of {', '.join(TEXT_KEYS + CHAT_KEYS)} with a text in "
                "it; rename the one that holds the text"
            )

    def _document(self, record: object) -> str | None:
        if isinstance(record, str):
            return record
        if not isinstance(record, dict):
            return None
        texts = (record.get(key) for key in TEXT_KEYS)
        text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        return self._conversation(record) if text is None else text

    def _conversation(self, record: dict) -> str | None:
        turns = next((turns for turns in map(_turns, map(record.get, CHAT_KEYS)) if turns), None)
        if turns is None:
            return None
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise FactorLLMError(
                f"{self.text} holds conversations, and the tokenizer has no chat template that says how the model "
                f"reads them; write each as one text under {TEXT_KEYS[0]!r}, or use a chat model"
            )
        try:
            with refusing("its chat template", "leave such conversations out"):
                return as_text(self._tokenizer, turns)
        except FactorLLMError as error:  # templates refuse conversations that their models cannot have, one by one
            self._reason = self._reason or str(error)
            return None


def local_path(text: str) -> Path | None:
    """Where a text lies on this machine, or None when nothing is there."""
    path = os.path.expanduser(text)
    return Path(path) if text and os.path.exists(path) else None


def kind_of(text: str) -> str:
    """The ending of a text file's name that says how it is read, `.jsonl`; without that of its compression."""
    return os.path.splitext(text.lower().removesuffix(".gz"))[1]


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The number of each line that is not blank, and what it says.

    Raises:
        FactorLLMError: when the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            what = f"line {number} of text file {path}"
            yield number, _parsed(line, what, "mend or remove the line, or fetch the file again where it was cut short")


def _records(text: str) -> Iterator[object]:
    readers = {".txt": _paragraphs, ".jsonl": _line_records, ".json": _json_records, ".parquet": _parquet_rows}
    path, kind, kinds = local_path(text), kind_of(text), ", ".join(readers)
    if path is None:
        if kind in readers:
            raise FactorLLMError(f"no such text file: {text}; check the path")
        yield from _dataset_records(text)
    elif path.is_dir():
        raise FactorLLMError(f"{text} is a folder; give one file, which may hold the content of all: {kinds}")
    elif not path.is_file():  # a pipe gives its content once, by which a text is known, and then none
        raise FactorLLMError(f"{text} is no ordinary file, and a text is read more than once; save it as a file")
    elif kind not in readers:
        raise FactorLLMError(f"{text} is not a kind of text that is read; use {kinds} or a dataset id")
    else:
        yield from readers[kind](path)


def _lines(path: Path) -> Iterator[str]:
    unzipped = gzip.open if path.suffix.lower() == ".gz" else open
    coding = {"encoding": "utf-8-sig", "errors": "surrogatepass"}
    with refusing(f"text file {path}", _INSTEAD), unzipped(path, "rt", **coding) as file:
        for number, line in enumerate(file, 1):
            if 4 * line.count("\0") > len(line):
                raise FactorLLMError(
                    f"text file {path} is no UTF-8: line {number} is full of NUL characters, as in UTF-16 or in a "
                    f"damaged file; {_INSTEAD}"
                )
            yield line


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def _line_records(path: Path) -> Iterator[object]:
    return (record for _, record in json_lines(path))


def _json_records(path: Path) -> Iterator[object]:
    content = "".join(_lines(path)).strip()
    first, _, more = content.partition("\n")
    if more and _is_json(first):
        yield from _line_records(path)
    elif content:
        yield from _spread(_parsed(content, f"text file {path}", "mend it, or fetch it again where it was cut short"))


def _is_json(content: str) -> bool:
    try:
        _parsed(content, "", "")
    except FactorLLMError:
        return False
    return True


def _parsed(content: str, what: str, instead: str) -> object:
    with refusing(what, instead):
        return json.loads(content)


def _spread(content: object) -> Iterable[object]:
    """The records of a whole JSON file: a list, one record, columns, or a mapping of records or of lists of them."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return [content]
    for key in (key for key in TEXT_KEYS + CHAT_KEYS if key in content):
        column = content[key]
        if _turns(column):
            return [content]
        if isinstance(column, dict):  # as pandas writes it, by row
            column = list(column.values())
        return [{key: value} for value in column] if isinstance(column, list) else [content]
    values = [value for value in content.values() if isinstance(value, list | dict)] or content.values()
    return (record for value in values for record in (value if isinstance(value, list) else [value]))


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    with refusing(f"text file {path}", "fetch it again"):
        file = pyarrow.parquet.ParquetFile(path)
        wanted = [name for name in file.schema_arrow.names if name in TEXT_KEYS + CHAT_KEYS]
        for batch in file.iter_batches(columns=wanted or None):
            columns = [_values(column) for column in batch.columns]
            yield from (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column) -> list:
    """A column of pyarrow as Python has it. Strings may hold halves of characters, which pyarrow itself refuses."""
    import pyarrow

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        return column.to_pylist()
    values = column.cast(pyarrow.large_binary()).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogatepass") for value in values]


def _dataset_records(text: str) -> Iterator[object]:
    import datasets

    name, _, configuration = text.partition(":")
    what = f"no such text: {text} is no local file, and as a data set it"
    with refusing(what, "give a .txt, .jsonl, .json or .parquet file, or a data set as NAME or NAME:CONFIGURATION"):
        yield from datasets.load_dataset(name, configuration or None, split="train", streaming=True)


def _turns(messages: object) -> list[dict] | None:
    """A conversation as chat templates want it, or None when it is none."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    turns = [_turn(message) for message in messages]
    return None if None in turns else turns


def _turn(message: dict) -> dict | None:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, as multimodal chats have them
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _ROLES.get(role, role), "content": content}


def _contents(record: object) -> str:
    if isinstance(record, dict):
        return f"the keys {', '.join(str(key)[:40] for key in list(record)[:10])}"
    return f"no keys, but are of the type {type(record).__name__}"


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a character, which JSON can hold and no tokenizer takes."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
