"""What llama.cpp's server can be asked for, in tokens."""

from __future__ import annotations

import json
import math
from urllib.error import HTTPError
from urllib.request import Request, urlopen

GREEDY = {"temperature": 0, "repeat_penalty": 1, "xtc_probability": 0, "mirostat": 0}
"""The likeliest token, whatever a file says of how its model is sampled."""


def post(address: str, path: str, body: dict) -> dict:
    """What a server at an address answers.

    Raises:
        RuntimeError: when it refuses.
    """
    request = Request(f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request) as reply:
            return json.load(reply)
    except HTTPError as error:
        raise RuntimeError(json.load(error)["error"]["message"]) from None


def completion(address: str, prompt: str | list[int], count: int, **more) -> dict:
    """What a server answers that goes on with a prompt by `count` tokens, unless `more` of the request says otherwise:
    the likeliest ones, end tokens not heeded, and nothing taken from its cache.

    Raises:
        RuntimeError: when it refuses.
    """
    asked = {"prompt": prompt, "n_predict": count, **GREEDY, "ignore_eos": True, "cache_prompt": False}
    return post(address, "/completion", asked | more)


class Client:
    """What a server of llama.cpp can be asked for about tokens.

    Args:
        address: of the server.

    Attributes:
        vocabulary: tokens that its model knows.
    """

    def __init__(self, address: str):
        self._address = address
        # Of the server, for reading a large vocabulary from the file takes seconds.
        with urlopen(f"{address}/v1/models") as reply:
            self.vocabulary: int = json.load(reply)["data"][0]["meta"]["n_vocab"]

    def generate(self, tokens: list[int], count: int) -> list[int]:
        return self._complete(tokens, count, return_tokens=True)["tokens"]

    def next_tokens(self, tokens: list[int], count: int, **more) -> list[tuple[int, float]]:
        # The server keeps back tokens that end within a character, and their probabilities with them. So the sampler is
        # made to take a plain one; the log-probabilities are those before sampling.
        plain = self.tokenize("a")[-1]
        answer = self._complete(tokens, 1, n_probs=count, logit_bias=[[plain, 1000]], **more)
        found = answer["completion_probabilities"][0]["top_logprobs"]
        return [(item["id"], _number(item["logprob"])) for item in found]

    def complete(self, tokens: list[int], count: int, stop: list[str]) -> str:
        """The most likely text that follows, up to the model's end, one of `stop`, or `count` tokens."""
        return self._complete(tokens, count, ignore_eos=False, stop=stop)["content"]

    def answer(self, tokens: list[int], count: int, grammar: str | None) -> str:
        """The most likely line of text that follows, of at most `count` tokens, all of which a GBNF grammar lets
        through. What the prompt before began with as well stays in the cache."""
        held = {"grammar": grammar} if grammar else {}
        said = self._complete(tokens, count, ignore_eos=False, stop=["\n"], cache_prompt=True, n_probs=1, **held)
        if any(item["logprob"] is None for item in said.get("completion_probabilities", ())):
            raise RuntimeError("it computes NaN")
        return said["content"]

    def score(self, tokens: list[int], following: list[int]) -> list[tuple[float, int]]:
        """For each token that follows its log-probability, and the likeliest one in its place."""
        return self._follow(-1, tokens, following)

    def _follow(self, slot: int, tokens: list[int], following: list[int]) -> list[tuple[float, int]]:
        # The server has no probabilities of prompts. So its sampler is made to take each token; the log-probabilities
        # are those before sampling, and what came before stays in the cache.
        found, goes_on = [], {"id_slot": slot, "cache_prompt": True}
        for token in following:
            forced = {"n_probs": 1, "logit_bias": [[token, 1000]], "ignore_eos": False}
            answer = self._complete(tokens, 1, **forced, **goes_on)
            said = answer.get("completion_probabilities")
            if said and said[0]["id"] == token:
                found.append((_number(said[0]["logprob"]), said[0]["top_logprobs"][0]["id"]))
            else:  # a token that ends within a character is kept back: it is among all of them
                every = self.next_tokens(tokens, self.vocabulary, **goes_on)
                found.append((dict(every)[token], every[0][0]))
            tokens = [*tokens, token]
        return found

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text's tokens; with `special` also those that the model wants at its beginning or end."""
        asked = {"content": text, "add_special": special, "parse_special": True}
        return post(self._address, "/tokenize", asked)["tokens"]

    def words(self) -> str:
        """What all tokens say, in the order of their ids: of two vocabularies that are not the same, not the same."""
        return post(self._address, "/detokenize", {"tokens": list(range(self.vocabulary))})["content"]

    def _complete(self, prompt: list[int], count: int, **more) -> dict:
        return completion(self._address, prompt, count, **more)


def _number(found: float | None) -> float:
    """What is no number, JSON has as null."""
    return math.nan if found is None else found
