"""What a conversion forgot, given back from the user's own files.

Passages that share words with the question are found by BM25. Which of them help is judged by the model that answers,
as the adaptive selection of RA-BLIP (arXiv 2410.14154) has it, by likelihood: a passage that answers a question makes
the question likely. It is kept where each token of the question gains, on average, more than `GAIN` nats over the same
question after a passage that was not found, and is less than that behind the best. Without such a passage the model
answers from memory. Asked whether a passage answers a question, models of this size say no to all (docs/serving.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from types import ModuleType

from factorllm.engines.llamacpp_client import Client, post
from factorllm.errors import FactorLLMError, refusing, refusing_path
from factorllm.serving.proxy import Front, texts_of

GAIN = 1.5
"""Nats a token of the question that a passage must bring to be kept, and that it may be behind the best."""

CANDIDATES = 4
"""Passages that BM25 proposes."""

SUFFIXES = (".txt", ".md", ".rst", ".org", ".tex", ".html", ".csv", ".json", ".jsonl", ".yaml", ".toml", ".py")
"""What is read."""

_LONGEST = 900  # characters of a passage
_LONG_WORD = re.compile(rf"[^ \t\n\v\f\r]{{{_LONGEST}}}(?=[^ \t\n\v\f\r])")
_ASKED = 48  # tokens of a question that are judged: the last
_MARK = "[the-question-stands-here]"
_WITH = "Answer with the help of this text, where it says something about the question:\n\n"


def bm25() -> ModuleType:
    """The library that searches.

    Raises:
        FactorLLMError: when it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise FactorLLMError("--retrieval searches with bm25s; pip install 'factorllm[retrieval]'") from None
    return bm25s


@dataclass(frozen=True)
class Passage:
    """A part of a file."""

    source: str
    text: str


def read_passages(folder: Path) -> list[Passage]:
    """The files of a folder and of those in it, in parts of whole paragraphs.

    Raises:
        FactorLLMError: when there is no text; for a file that cannot be read, and for what no path can be.
    """
    with refusing_path(folder):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = [Passage(str(path.relative_to(folder)), text) for path in files for text in _parts(_read(path))]
    if not found:
        raise FactorLLMError(f"{folder} holds no text; give a folder with files of {', '.join(SUFFIXES)}")
    return found


def _read(path: Path) -> str:
    with refusing(path, "move it away"):
        return path.read_text(encoding="utf-8", errors="replace")


def _parts(text: str) -> Iterator[str]:
    """Paragraphs, put together up to so many characters; longer ones are cut, between words where there are any."""
    part = ""
    # A file without spaces, as minified JSON is, is cut here: wrap copies what is left of a word for each line of it.
    for paragraph in _LONG_WORD.sub(r"\g<0> ", text).split("\n\n"):
        for piece in wrap(paragraph, _LONGEST, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False):
            if part and len(part) + len(piece) + 2 > _LONGEST:
                yield part
                part = ""
            part = f"{part}\n\n{piece}" if part else piece
    if part:
        yield part


class Library:
    """Passages that can be searched by words.

    Raises:
        FactorLLMError: when bm25s is not installed, or the folder holds no text.
    """

    def __init__(self, folder: Path):
        self._bm25s = bm25()
        self.passages = read_passages(folder)
        self._index = self._bm25s.BM25()
        self._index.index(self._words([passage.text for passage in self.passages]), show_progress=False)

    def search(self, question: str, count: int = CANDIDATES) -> list[int]:
        """Numbers of the passages that share words with a question, the best first."""
        words = self._words([question])
        if not words[0]:
            return []
        count = min(count, len(self.passages))
        numbers, scores = self._index.retrieve(words, k=count, show_progress=False)
        return [int(number) for number, score in zip(numbers[0], scores[0], strict=True) if score > 0]

    def candidates(self, question: str) -> tuple[list[str], str]:
        """The passages that are found, in the order of the files, and one that is not, empty where all are."""
        found = sorted(self.search(question))
        other = next((number for number in range(len(self.passages)) if number not in found), None)
        return [self.passages[each].text for each in found], "" if other is None else self.passages[other].text

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._bm25s.tokenize(texts, return_ids=False, show_progress=False)


class Judge:
    """What a model in llama.cpp's server says of passages.

    Args:
        address: of the server.
    """

    def __init__(self, address: str):
        self._address, self._client = address, Client(address)

    def gains(self, question: str, passages: list[str], unrelated: str) -> list[float]:
        """For each passage, nats that a token of the question gains by it on average, over an unrelated passage."""
        tokens = self._client.tokenize(question)[-_ASKED:]
        base, *found = [self._log_likelihood(passage, tokens) for passage in [unrelated, *passages]]
        return [(each - base) / len(tokens) for each in found]

    def _log_likelihood(self, passage: str, tokens: list[int]) -> float:
        return sum(value for value, _ in self._client.score(self._before_question(passage), tokens))

    def _before_question(self, passage: str) -> list[int]:
        """Tokens of a conversation in the model's own template, up to where the question begins."""
        asked = {"messages": with_passages([{"role": "user", "content": _MARK}], [passage])}
        prompt, found, _ = post(self._address, "/apply-template", asked)["prompt"].rpartition(_MARK)
        if not found:
            raise FactorLLMError(
                "the model's chat template does not show what the user asked; serve it without --retrieval"
            )
        return self._client.tokenize(prompt, special=True)


def helpful(gains: list[float]) -> list[bool]:
    """Which passages are kept, by what they bring."""
    return [gain > GAIN and gain > max(gains) - GAIN for gain in gains]


def with_passages(messages: list[dict], passages: list[str]) -> list[dict]:
    """A conversation that begins with passages, after the user's own system message if there is one."""
    text, own = _WITH + "\n\n".join(passages), []
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        own, messages = list(texts_of(first.get("content"))), messages[1:]
    return [{"role": "system", "content": "\n\n".join([*own, text])}, *messages]


class Retrieval(Front):
    """Conversations get the passages that help; all else goes on as it is.

    Args:
        address: of llama.cpp's server.
        name: of its model.
    """

    def __init__(self, library: Library, address: str, name: str):
        self._library, self._address, self.name = library, address, name
        self._judge = Judge(address)
        self._asked = self._helped = self._found = self._kept = 0

    @contextmanager
    def place(self, path: str, body: dict) -> Iterator[tuple[str, dict]]:
        question = question_of(body.get("messages"))
        if question and (kept := self.select(question)):
            body = body | {"messages": with_passages(body["messages"], kept)}
        yield self._address, body

    def select(self, question: str) -> list[str]:
        """The passages that are kept, in the order of the files: so a follow-up finds them in the cache.

        Raises:
            FactorLLMError: when the model cannot judge them, as for a context that is too short.
        """
        texts, unrelated = self._library.candidates(question)
        try:
            gains = self._judge.gains(question, texts, unrelated) if texts else []
        except RuntimeError as error:
            raise FactorLLMError(f"llama.cpp cannot judge passages: {error}; more --context may help") from None
        kept = [text for text, helps in zip(texts, helpful(gains), strict=True) if helps]
        self._asked, self._helped = self._asked + 1, self._helped + bool(kept)
        self._found, self._kept = self._found + len(texts), self._kept + len(kept)
        return kept

    def metrics(self) -> str:
        counters = {
            "questions": self._asked,
            "questions_with_passages": self._helped,
            "passages_found": self._found,
            "passages_kept": self._kept,
        }
        return "".join(f"factorllm_retrieval_{name}_total {value}\n" for name, value in counters.items())


def question_of(messages: object) -> str:
    """What the user asked last; of images and the like, the text beside them."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return ""
    last = messages[-1]
    return " ".join(texts_of(last.get("content"))).strip() if last.get("role") == "user" else ""
