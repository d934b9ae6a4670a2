"""What every engine can do. Only the standard library is needed here: it also runs in the environments of others."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How a model is loaded.

    Attributes:
        context: tokens, prompt and answer together, that each sequence may have.
        batch: sequences that run at once.
        decode_threads: threads of the steps of one token; None leaves it to OMP_NUM_THREADS, and
            without that to the engine.
        prefill_threads: threads of prompts.
        dtype: of weights that are not quantised; None leaves it to the engine.
        experts: back end of transformers' experts.
        reader: `.gguf` file of the dense model, which reads prompts for its student; llama.cpp's only.
    """

    context: int = 4096
    batch: int = 1
    decode_threads: int | None = None
    prefill_threads: int | None = None
    dtype: str | None = None
    experts: str | None = None
    reader: str | None = None


class Engine(ABC):
    """One model, loaded in one engine. Tokens are ids.

    Args:
        model: what the engine loads: a `.gguf` file for llama.cpp, a folder for the others.

    Raises:
        RuntimeError: when the engine cannot load the model.
    """

    @abstractmethod
    def __init__(self, model: str, options: Options): ...

    @abstractmethod
    def generate(self, tokens: list[int], count: int) -> list[int]:
        """The most likely `count` tokens that follow, end tokens not heeded."""

    @abstractmethod
    def next_tokens(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        """The `count` most likely next tokens with their log-probabilities, the likeliest first."""

    @abstractmethod
    def prefill(self, length: int) -> float:
        """Seconds from a prompt of `length` random tokens to the first new token."""

    @abstractmethod
    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of one step of `batch` sequences after prompts of `context` tokens each, mean over `steps`."""


def random_tokens(length: int, vocabulary: int, seed: int) -> list[int]:
    """A prompt that no cache has seen."""
    chooser = random.Random(seed)
    return [chooser.randrange(vocabulary) for _ in range(length)]
