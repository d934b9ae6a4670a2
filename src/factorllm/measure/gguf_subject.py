"""A `.gguf` file that is to be scored: checked, and asked through llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from factorllm.dense.gguf.file import open_gguf, read_field, split_count
from factorllm.dense.gguf.keys import Keys
from factorllm.engines import EngineProcess, Options, installed
from factorllm.engines.process import how_to_install
from factorllm.errors import FactorLLMError
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, ask, need_lm_eval
from factorllm.runs.digest import digest_of

_CONTEXT = 4096
"""Tokens of a question and its answer; less where the model has been trained on less."""


@dataclass(frozen=True)
class GgufSubject:
    """A file that llama.cpp loads anew for each task.

    Attributes:
        fingerprint: of the file, and of the engine.
        context: tokens that a question and its answer may have.
        begin: id of the token that begins a text, or else ends one.
    """

    path: Path
    fingerprint: tuple[str, ...]
    context: int
    begin: int

    @classmethod
    def of(cls, path: Path) -> GgufSubject:
        """The subject of a file.

        Raises:
            FactorLLMError: when it is no GGUF file, a part of one, or llama.cpp is not installed.
        """
        if not installed("llamacpp"):
            raise FactorLLMError(f"{path} is measured through llama.cpp, which is not installed; {_INSTALL}")
        if not path.is_file():
            raise FactorLLMError(f"no file {path}; check the path")
        reader = open_gguf(path)
        if split_count(path, reader) > 1:
            raise FactorLLMError(
                f"{path} is a part of a split model, and whole files are measured; join them with "
                "llama-gguf-split --merge"
            )

        def said(key: str) -> Any:
            return read_field(str(path), reader.fields, key)

        ids = (said(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
        begin = next((token for token in ids if token is not None), 0)
        trained = Keys(str(path), reader.fields, said("general.architecture")).integer("context_length", _CONTEXT)
        engine = f"xllamacpp {version('xllamacpp')}"
        return cls(path, (digest_of([path]), engine), min(trained, _CONTEXT), begin)

    def score(self, task: str, settings: EvalSettings) -> Score:
        """The score on one task."""
        need_lm_eval()
        from factorllm.measure.served import Served

        with EngineProcess("llamacpp", self.path, Options(context=self.context)) as process:
            model = Served(process, self.context, self.begin)
            return ask(model, task, settings.data, settings.limit, settings.run_generated_code)


_INSTALL = how_to_install("llamacpp")


def check_gguf(against: str | None, text: str | None, settings: EvalSettings) -> None:
    """Refuse what is not measured through llama.cpp.

    Raises:
        FactorLLMError: with what to do instead.
    """
    if against and not against.endswith(".gguf"):
        raise FactorLLMError(
            f"a .gguf file is measured through llama.cpp and {against} would be through transformers, which compares "
            "engines as well as models; give a .gguf file with --against too"
        )
    if text is not None:
        raise FactorLLMError(
            "perplexity and agreement on a --text are not measured through llama.cpp, whose server does not say the "
            "probabilities of a whole text; give the checkpoint's folder"
        )
    plain = EvalSettings()
    if (settings.device, settings.dtype) != (plain.device, plain.dtype):
        raise FactorLLMError("llama.cpp computes a .gguf file as it is stored; leave out --device and --dtype")
