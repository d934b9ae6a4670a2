"""A llama.cpp server in a process of its own, so that one is loaded while others answer, and its memory is given back
when it ends: `python -m factorllm.serving.backend GGUF OPTIONS NAME`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from factorllm.engines.base import Options
from factorllm.engines.llamacpp import server_params, start_server
from factorllm.engines.process import STARTED_WITH
from factorllm.errors import FactorLLMError


class Backend:
    """A model that is loaded and answers at `address`.

    Args:
        name: of the model, in its answers.

    Raises:
        FactorLLMError: when llama.cpp cannot load it.
    """

    def __init__(self, gguf_file: Path, options: Options, name: str):
        command = [sys.executable, "-m", "factorllm.serving.backend", str(gguf_file)]
        command += [json.dumps(asdict(options)), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self._process = subprocess.Popen(command, **pipes, text=True, env=os.environ | STARTED_WITH)
        except OSError as error:  # no more processes or open files
            raise FactorLLMError(f"no process can be started to load {gguf_file}: {error.strerror}") from None
        line = self._process.stdout.readline()
        if not line.startswith("http"):
            self.close()
            raise FactorLLMError(line.strip() or f"llama.cpp cannot load {gguf_file}: its process ended")
        self.address = line.strip()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def main() -> None:
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    params = server_params(sys.argv[1], Options(**json.loads(sys.argv[2])))
    params.ui, params.model_alias = False, {sys.argv[3]}
    try:
        server = start_server(params, f"load {sys.argv[1]}")
    except FactorLLMError as error:
        said.write(f"{error}\n")
        os._exit(1)
    said.write(f"{server.listening_address}\n")
    sys.stdin.read()  # until whoever started it has ended
    os._exit(0)


if __name__ == "__main__":
    main()
