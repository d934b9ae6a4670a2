"""Conversations with a model in llama.cpp's own server, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from factorllm.engines.llamacpp import open_server, server_params
from factorllm.errors import FactorLLMError
from factorllm.serving.settings import ServeSettings


class Chat:
    """One conversation with one model, in its own chat template.

    Args:
        gguf_file: what llama.cpp loads.

    Raises:
        FactorLLMError: when llama.cpp is not installed, or cannot load the file.
    """

    def __init__(self, gguf_file: Path, settings: ServeSettings):
        params = server_params(str(gguf_file), settings.options)
        params.ui = False
        self._server = open_server(params, f"load {gguf_file}")
        self._messages: list[dict[str, str]] = []
        self._context = settings.context
        self._longest = max(settings.context // 4, 1)  # of an answer, so that there is room for some turns

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; it is part of the conversation once all of it has come.

        Raises:
            FactorLLMError: when the server refuses, as for a conversation that has grown too long.
        """
        asked = [*self._messages, {"role": "user", "content": question}]
        body = {"messages": asked, "stream": True, "max_tokens": self._longest}
        request = Request(
            f"{self._server.listening_address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = ""
        try:
            with urlopen(request) as reply:
                for piece in _pieces(reply):
                    answer += piece
                    yield piece
        except HTTPError as error:
            said = json.load(error)["error"]
            # A model's own context may be the smaller one.
            more = ", or give more --context" if said.get("n_ctx", self._context) >= self._context else ""
            raise FactorLLMError(f"llama.cpp refused: {said['message']}; begin a new conversation{more}") from None
        self._messages = [*asked, {"role": "assistant", "content": answer}]


def _pieces(lines: Iterator[bytes]) -> Iterator[str]:
    """The text of an answer that is sent as server-sent events."""
    for line in lines:
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            delta = json.loads(data)["choices"][0]["delta"]
            yield delta.get("content") or ""
