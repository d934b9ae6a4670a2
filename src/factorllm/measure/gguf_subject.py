"""A `.gguf` file that is to be scored: checked, and asked through llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factorllm.dense.gguf.file import open_gguf, read_field, split_count
from factorllm.dense.gguf.keys import Keys
from factorllm.dense.gguf.tokenizer import build_tokenizer
from factorllm.engines import EngineProcess, Options, installed
from factorllm.engines.process import how_to_install
from factorllm.errors import FactorLLMError
from factorllm.measure.agreement import Agreement
from factorllm.measure.chain.answers import ServedAnswers
from factorllm.measure.chain.run import Ask
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, ask, need_lm_eval
from factorllm.measure.vocabulary import Vocabulary
from factorllm.runs.digest import digest_of
from factorllm.runs.settings import Settings
from factorllm.text.calibration import hold_out
from factorllm.text.parts import open_text

_CONTEXT = 4096
"""Tokens of a question and its answer; less where the model has been trained on less."""

_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Followed:
    """What a model says of each token of a text but the first of each sequence.

    Attributes:
        logprobs: of the tokens that are there, in nats.
        likeliest: ids of those that it would have taken.
    """

    logprobs: list[float]
    likeliest: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def agreement(self, dense: Followed) -> Agreement:
        """With the dense model on the same text; llama.cpp's server does not give away what KL needs."""
        same = sum(own == its for own, its in zip(self.likeliest, dense.likeliest, strict=True))
        return Agreement(None, same / len(self.likeliest))


@dataclass(frozen=True)
class GgufSubject:
    """A file that llama.cpp loads when it is asked something.

    Attributes:
        fingerprint: of the file, of the one that reads its prompts, and of the engine.
        context: tokens that a question and its answer may have.
        begin: id of the token that begins a text, or else ends one.
        ends: whether llama.cpp puts an end token behind each text, as the file says.
        vocabulary: its tokens.
        reader: the dense model's file, where it reads the prompts.
    """

    path: Path
    fingerprint: tuple[str, ...]
    context: int
    begin: int
    ends: bool
    vocabulary: Vocabulary
    reader: Path | None = None

    @classmethod
    def of(cls, path: Path) -> GgufSubject:
        """The subject of a file.

        Raises:
            FactorLLMError: when it is no GGUF file, a part of one, or llama.cpp is not installed.
        """
        if not installed("llamacpp"):
            raise FactorLLMError(
                f"{path} is measured through llama.cpp, which is not installed; {how_to_install('llamacpp')}"
            )
        if not path.is_file():
            raise FactorLLMError(f"no file {path}; check the path")
        reader = open_gguf(path)
        if split_count(path, reader) > 1:
            raise FactorLLMError(
                f"{path} is a part of a split model, and whole files are measured; join them with "
                "llama-gguf-split --merge"
            )

        def said(key: str) -> Any:
            return read_field(str(path), reader.fields, key)

        ids = (said(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
        begin, ends = next((token for token in ids if token is not None), 0), bool(said("tokenizer.ggml.add_eos_token"))
        trained = Keys(str(path), reader.fields, said("general.architecture")).integer("context_length", _CONTEXT)
        engine = f"xllamacpp {version('xllamacpp')}"
        tokens = said("tokenizer.ggml.tokens")
        vocabulary = Vocabulary.of(len(tokens), {token: index for index, token in enumerate(tokens)})
        return cls(path, (digest_of([path]), engine), min(trained, _CONTEXT), begin, ends, vocabulary)

    def read_by(self, dense: GgufSubject) -> GgufSubject:
        """The same model, whose prompts the dense one reads."""
        context = min(self.context, dense.context)
        return replace(self, fingerprint=self.fingerprint + dense.fingerprint, context=context, reader=dense.path)

    @property
    def size(self) -> int:
        """Bytes of what is loaded when it is asked."""
        return sum(path.stat().st_size for path in (self.path, self.reader) if path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file describes.

        Raises:
            FactorLLMError: when it is of a kind that is not built here.
        """
        fields = open_gguf(self.path).fields
        return build_tokenizer(
            lambda key: read_field(str(self.path), fields, f"tokenizer.{key}"), str(self.path), self.context
        )

    def held_out(self, text: str, made_with: Settings | None = None) -> Tensor:
        """The part of a text that `factorize` with these settings, or default ones, holds out.

        Returns:
            (sequences, length), int64.

        Raises:
            FactorLLMError: when the text cannot be read or is too short.
        """
        settings = made_with or Settings()
        settings = settings.model_copy(update={"length": min(settings.length, self.context)})
        return hold_out(open_text(text, self.tokenizer, settings), settings)

    def follow(self, tokens: Tensor, tick: Callable[[int], None] = lambda sequences: None) -> Followed:
        """What the model says of a text.

        Args:
            tokens: (sequences, length), int64.
            tick: called with the number of sequences after each batch.

        Raises:
            FactorLLMError: when llama.cpp fails, or computes NaN.
        """
        found: list[tuple[float, int]] = []
        with EngineProcess("llamacpp", self.path, Options(tokens.shape[1] + 1, _ROWS_AT_ONCE)) as process:
            for rows in tokens.split(_ROWS_AT_ONCE):
                found += [pair for row in process.score_rows(rows.tolist()) for pair in row]
                tick(len(rows))
        logprobs, likeliest = ([pair[place] for pair in found] for place in (0, 1))
        if not all(map(math.isfinite, logprobs)):
            raise FactorLLMError(
                f"llama.cpp computes NaN or infinity with {self.path}; write it again, or leave out --text"
            )
        return Followed(logprobs, likeliest)

    @contextmanager
    def scoring(self, settings: EvalSettings, threads: int | None = None) -> Iterator[Callable[[str], Score]]:
        """The model, loaded to be scored on one task after the other.

        Args:
            threads: None leaves them to the engine.
        """
        need_lm_eval()
        from factorllm.measure.served import Served

        with EngineProcess("llamacpp", self.path, self._options(threads)) as process:
            model = Served(process, self.context, self.begin, self.ends)
            yield lambda task: ask(model, task, settings.data, settings.limit, settings.run_generated_code)

    @contextmanager
    def answering(self) -> Iterator[Ask]:
        """The model, loaded to be asked the questions of a chain."""
        with EngineProcess("llamacpp", self.path, self._options()) as process:
            yield ServedAnswers(process, self.context, self.ends)

    def _options(self, threads: int | None = None) -> Options:
        reader = str(self.reader) if self.reader else None
        return Options(context=self.context, decode_threads=threads, reader=reader)


def check_gguf(against: str | None, settings: EvalSettings) -> None:
    """Refuse what is not measured through llama.cpp.

    Raises:
        FactorLLMError: with what to do instead.
    """
    if against and not against.endswith(".gguf"):
        raise FactorLLMError(
            f"a .gguf file is measured through llama.cpp and {against} would be through transformers, which compares "
            "engines as well as models; give a .gguf file with --against too"
        )
    plain = EvalSettings()
    if (settings.device, settings.dtype) != (plain.device, plain.dtype):
        raise FactorLLMError("llama.cpp computes a .gguf file as it is stored; leave out --device and --dtype")
