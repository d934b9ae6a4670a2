"""Serving a student whose prompts its dense model reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from factorllm.engines.dense_prompt import DensePrompt
from factorllm.engines.llamacpp_client import Client, post
from factorllm.errors import FactorLLMError
from factorllm.serving.proxy import Front


class DensePromptFront(Front):
    """Each request's prompt is read by the dense model into a slot that answers nothing else meanwhile.

    Args:
        reader: between the two servers.
        address: of the student's.
        name: of the student.
        slots: conversations at once.
    """

    def __init__(self, reader: DensePrompt, address: str, name: str, slots: int):
        self._reader, self._address, self.name = reader, address, name
        self._client = Client(address)
        self._free: dict[int, list[int]] = {slot: [] for slot in range(slots)}  # with the prompt that each has read
        self._changed = threading.Condition()

    @contextmanager
    def place(self, path: str, body: dict) -> Iterator[tuple[str, dict]]:
        with _told("does not take"):
            tokens = self._prompt(body)
        with self._slot(tokens) as slot:
            with _told("cannot read"):
                self._reader.read(tokens, slot)
            yield self._address, body | {"id_slot": slot, "cache_prompt": True}

    def _prompt(self, body: dict) -> list[int]:
        """The tokens of a request, as the student's server will make them of it."""
        if body.get("n") not in (None, 1):
            raise FactorLLMError("a prompt that the dense model reads is answered once; leave out n, and ask again")
        if "messages" in body:
            return self._client.tokenize(post(self._address, "/apply-template", body)["prompt"], special=True)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            (prompt,) = prompt
        if isinstance(prompt, str):
            return self._client.tokenize(prompt, special=True)
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return prompt
        raise FactorLLMError("the prompt is neither one text nor the tokens of one; ask for one at a time")

    @contextmanager
    def _slot(self, tokens: list[int]) -> Iterator[int]:
        """A slot, once one is free: the one that has read most of this prompt already."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            slot = max(self._free, key=lambda free: _in_common(self._free[free], tokens))
            del self._free[slot]
        try:
            yield slot
        finally:
            with self._changed:
                self._free[slot] = tokens
                self._changed.notify()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What llama.cpp refuses, the client is told."""
    try:
        yield
    except RuntimeError as error:
        raise FactorLLMError(f"llama.cpp {what} the prompt: {error}") from None


def _in_common(one: list[int], other: list[int]) -> int:
    """Tokens that two prompts begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
