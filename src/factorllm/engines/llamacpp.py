"""llama.cpp, in process through the wheel `xllamacpp`."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from factorllm.engines.base import Engine, Options, random_tokens
from factorllm.engines.dense_prompt import DensePrompt
from factorllm.engines.llamacpp_client import Client
from factorllm.engines.process import how_to_install, installed
from factorllm.errors import RENAME, FactorLLMError, check_utf8


def require_llamacpp() -> None:
    """Refuse before any work where llama.cpp is missing.

    Raises:
        FactorLLMError: when it is not installed.
    """
    if not installed("llamacpp"):
        raise FactorLLMError(f"llama.cpp is not installed; {how_to_install('llamacpp')}")


def server_params(model: str, options: Options, handed: Path | None = None):
    """Parameters of llama.cpp's server for one model.

    Args:
        handed: folder that its slots' caches are saved to and restored from.

    Raises:
        FactorLLMError: when llama.cpp is not installed, or opens no such path.
    """
    require_llamacpp()
    check_utf8(model, RENAME)
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
    if handed:
        params.slot_save_path = f"{handed}/"
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


_READ_IN = 0  # the slot that the dense model's prompts are handed over in


class LlamaCpp(Client, Engine):
    def __init__(self, model: str, options: Options):
        handed = Path(tempfile.mkdtemp(prefix="factorllm-handed-")) if options.reader else None
        self._server, self._batch = _plain_server(model, options, handed), options.batch
        super().__init__(self._server.listening_address)
        self._seeds = itertools.count()
        self._read: dict[int, list[int]] = {}  # by slot, the prompt that its cache holds
        self._reader: DensePrompt | None = None
        if options.reader and handed:
            self._dense = _plain_server(options.reader, options, handed)
            addresses = self._dense.listening_address, self._server.listening_address
            self._reader = DensePrompt(*addresses, handed)

    def score(self, tokens: list[int], following: list[int]) -> list[tuple[float, int]]:
        if self._reader is None:
            return super().score(tokens, following)
        self._reader.read(tokens, _READ_IN)
        return self._follow(_READ_IN, tokens, following)

    def _complete(self, prompt: list[int], count: int, **more) -> dict:
        """A request that names its slot goes on there; the prompt of any other is the dense model's to read."""
        if self._reader is not None and "id_slot" not in more:
            self._reader.read(prompt, _READ_IN)
            more |= {"id_slot": _READ_IN, "cache_prompt": True}
        return super()._complete(prompt, count, **more)

    def score_rows(self, rows: list[list[int]]) -> list[list[tuple[float, int]]]:
        """What `score` says of all tokens of each row but the first; as many rows run at once as sequences may."""
        found = []
        with ThreadPoolExecutor(self._batch) as pool:
            for first in range(0, len(rows), self._batch):
                some = rows[first : first + self._batch]
                found += pool.map(lambda slot, row: self._follow(slot, row[:1], row[1:]), range(len(some)), some)
        return found

    def prefill(self, length: int) -> float:
        prompt = self._read[0] = self._unseen(length)
        start = time.perf_counter()
        self._complete(prompt, 1, id_slot=0, cache_prompt=True)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> float:
        def run(slot: int, count: int) -> dict:
            return self._complete(self._prompt(slot, context), count, id_slot=slot, cache_prompt=True)

        # The prompts are put in their slots' caches first, so that no prompt is among the steps that are timed.
        with ThreadPoolExecutor(batch) as pool:
            list(pool.map(run, range(batch), [1] * batch))
            answers = list(pool.map(run, range(batch), [steps + 1] * batch))
        return max(answer["timings"]["predicted_ms"] for answer in answers) / steps / 1000

    def _prompt(self, slot: int, length: int) -> list[int]:
        """A prompt that the slot has read already, if it has read one so long: to read it takes longer than a step."""
        if len(self._read.get(slot, ())) < length:
            self._read[slot] = self._unseen(length)
        return self._read[slot][:length]

    def _unseen(self, length: int) -> list[int]:
        return random_tokens(length, self.vocabulary, next(self._seeds))


def _plain_server(model: str, options: Options, handed: Path | None):
    """A server that keeps nothing between requests but what its slots hold."""
    import xllamacpp

    params = server_params(model, options, handed)
    params.cache_ram_mib = 0
    params.ui = False
    return xllamacpp.Server(params)
