"""A student with an adapter for each kind of text: each request is given the mixture that the intuition says of its
prompt, by the field `lora` that llama.cpp's server knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from factorllm.serving.proxy import Front, text_of
from factorllm.text.intuition import Intuition

_LEAST = 0.02
"""Probability of a kind whose adapter is left out: each one that is not takes time for each token."""


class Mixed(Front):
    """llama.cpp's server with all adapters, in the order of their kinds.

    Args:
        address: http://HOST:PORT of it.
        name: of the model.
    """

    def __init__(self, address: str, name: str, intuition: Intuition):
        self._address, self.name, self._intuition = address, name, intuition

    @contextmanager
    def place(self, path: str, body: dict) -> Iterator[tuple[str, dict]]:
        """A request that says its own scales keeps them."""
        yield self._address, {"lora": self.scales(body)} | body

    def scales(self, body: dict) -> list[dict[str, Any]]:
        """As a request has them under `lora`; the kinds that count sum to 1."""
        found = self._intuition.probabilities(text_of(body))
        found = found * (found >= min(_LEAST, found.max()))
        return [{"id": kind, "scale": float(scale)} for kind, scale in enumerate(found / found.sum())]
