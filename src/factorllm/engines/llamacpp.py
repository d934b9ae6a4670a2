"""llama.cpp, in process through the wheel `xllamacpp`."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from factorllm.engines.base import Engine, Options, random_tokens
from factorllm.engines.process import how_to_install, installed
from factorllm.errors import FactorLLMError


def require_llamacpp() -> None:
    """Refuse before any work where llama.cpp is missing.

    Raises:
        FactorLLMError: when it is not installed.
    """
    if not installed("llamacpp"):
        raise FactorLLMError(f"llama.cpp is not installed; {how_to_install('llamacpp')}")


def server_params(model: str, options: Options):
    """Parameters of llama.cpp's server for one model.

    Raises:
        FactorLLMError: when llama.cpp is not installed.
    """
    require_llamacpp()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = options.batch
    params.n_ctx = options.context * options.batch
    params.verbosity = -1
    if decode := options.decode_threads or _usual_threads():
        params.cpuparams.n_threads = decode
    if prefill := options.prefill_threads or decode:
        params.cpuparams_batch.n_threads = prefill
    return params


def _usual_threads() -> int | None:
    """As many as OMP_NUM_THREADS allows, which torch heeds too; None where it says nothing.

    llama.cpp's threads wait for each other by spinning: two on a core that is shared take ten times as long as one.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) or None if said.isdecimal() else None


def open_server(params, does: str):
    """llama.cpp's own server in this process, which lives as long as what is returned.

    Args:
        params: its parameters, of `server_params`.
        does: what it is opened for, as in "llama.cpp cannot ...".

    Raises:
        FactorLLMError: when llama.cpp cannot.
    """
    import xllamacpp

    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise FactorLLMError(f"llama.cpp cannot {does}: {error}") from None


def start_server(params, does: str):
    """`open_server`, once its loop runs: one that is told to stop before never ends. So it says one token."""
    server = open_server(params, does)
    server.handle_completions({"prompt": [0], "max_tokens": 1})
    return server


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


class Client:
    """What a server of llama.cpp can be asked for about tokens.

    Args:
        address: of the server.
    """

    def __init__(self, address: str):
        self._address = address
        # Of the server, for reading a large vocabulary from the file takes seconds.
        with urlopen(f"{address}/v1/models") as reply:
            self._vocabulary: int = json.load(reply)["data"][0]["meta"]["n_vocab"]

    def generate(self, tokens: list[int], count: int) -> list[int]:
        return self._complete(tokens, count, return_tokens=True)["tokens"]

    def next_tokens(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        # The server keeps back tokens that end within a character, and their probabilities with them. So the sampler is
        # made to take a plain one; the log-probabilities are those before sampling.
        plain = self.tokenize("a")[-1]
        answer = self._complete(tokens, 1, n_probs=count, logit_bias=[[plain, 1000]])
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
        found = []
        for token in following:
            forced = {"n_probs": 1, "logit_bias": [[token, 1000]], "ignore_eos": False}
            answer = self._complete(tokens, 1, **forced, cache_prompt=True, id_slot=slot)
            said = answer.get("completion_probabilities")
            if said and said[0]["id"] == token:
                found.append((_number(said[0]["logprob"]), said[0]["top_logprobs"][0]["id"]))
            else:  # a token that ends within a character is kept back: it is among all of them
                every = self.next_tokens(tokens, self._vocabulary)
                found.append((dict(every)[token], every[0][0]))
            tokens = [*tokens, token]
        return found

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text's tokens; with `special` also those that the model wants at its beginning or end."""
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def _complete(self, prompt: list[int], count: int, **more) -> dict:
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        } | more
        return self._post("/completion", body)

    def _post(self, path: str, body: dict) -> dict:
        return post(self._address, path, body)


class LlamaCpp(Client, Engine):
    def __init__(self, model: str, options: Options):
        import xllamacpp

        params = server_params(model, options)
        params.cache_ram_mib = 0
        params.ui = False
        self._server, self._batch = xllamacpp.Server(params), options.batch
        super().__init__(self._server.listening_address)
        self._seeds = itertools.count(1000)

    def score_rows(self, rows: list[list[int]]) -> list[list[tuple[float, int]]]:
        """What `score` says of all tokens of each row but the first; as many rows run at once as sequences may."""
        found = []
        with ThreadPoolExecutor(self._batch) as pool:
            for first in range(0, len(rows), self._batch):
                some = rows[first : first + self._batch]
                found += pool.map(lambda slot, row: self._follow(slot, row[:1], row[1:]), range(len(some)), some)
        return found

    def prefill(self, length: int) -> float:
        prompt = random_tokens(length, self._vocabulary, next(self._seeds))
        start = time.perf_counter()
        self._complete(prompt, 1)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> float:
        # The prompts are put in their slots' caches first, so that no prompt is among the steps that are timed.
        prompts = [random_tokens(context, self._vocabulary, slot) for slot in range(batch)]

        def run(slot: int, count: int) -> dict:
            return self._complete(prompts[slot], count, id_slot=slot, cache_prompt=True)

        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(run, range(batch), [1] * batch))
            answers = list(pool.map(run, range(batch), [steps + 1] * batch))
        return max(answer["timings"]["predicted_ms"] for answer in answers) / steps / 1000


def _number(found: float | None) -> float:
    """What is no number, JSON has as null."""
    return math.nan if found is None else found
