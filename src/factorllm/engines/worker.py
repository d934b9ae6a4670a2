"""The process that holds one loaded model: `python -m factorllm.engines.worker ENGINE MODEL OPTIONS`.

Reads one request a line from stdin, `{"method": ..., "arguments": [...]}`, and answers each with one line of JSON on
what was stdout when it started; what the engine itself prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from factorllm.engines.base import Engine, Options
from factorllm.runs.memory import peak_memory

CLASSES = {"transformers": "Transformers", "llamacpp": "LlamaCpp", "vllm": "Vllm"}
"""Engine classes by the name of their module."""


def load(engine: str, model: str, options: Options) -> Engine:
    module = importlib.import_module(f"factorllm.engines.{engine}")
    return getattr(module, CLASSES[engine])(model, options)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, model, options = sys.argv[1:4]

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        engine = load(name, model, Options(**json.loads(options)))
    except Exception as error:  # whatever an engine raises, the caller is told in one line
        return answer({"error": f"{type(error).__name__}: {error}"})
    answer({"result": None})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["method"] == "peak_memory":
                result = peak_memory()
            else:
                result = getattr(engine, request["method"])(*request["arguments"])
            answer({"result": result})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    answers.close()
    os._exit(0)  # engines' own threads must not keep the process


if __name__ == "__main__":
    main()
