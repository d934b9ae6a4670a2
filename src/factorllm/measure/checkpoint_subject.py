"""A model that is to be scored in transformers: a student's checkpoint, or a dense model of any kind that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense import open_model
from factorllm.dense.safetensors import open_folder, read_tokenizer
from factorllm.measure.chain.answers import LoadedAnswers
from factorllm.measure.chain.run import Ask
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score, run_task
from factorllm.measure.vocabulary import Vocabulary
from factorllm.runs.digest import digest_of
from factorllm.student.adapters import adapter_files
from factorllm.student.read import load_student


@dataclass(frozen=True)
class CheckpointSubject:
    """A model that is loaded when it is first needed.

    Attributes:
        fingerprint: of its config, its weights, its tokenizer, how it generates, and of the precision.
        vocabulary: its tokens.
        mixes: whether it has adapters that are mixed by what a prompt says.
    """

    fingerprint: tuple[str, ...]
    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]
    mixes: bool = False

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()

    @contextmanager
    def scoring(self, settings: EvalSettings, _threads: int | None = None) -> Iterator[Callable[[str], Score]]:
        allowed = settings.run_generated_code
        yield lambda task: run_task(self.model, self.tokenizer, task, settings.data, settings.limit, allowed)

    @contextmanager
    def answering(self) -> Iterator[Ask]:
        yield LoadedAnswers(self.model, self.tokenizer, self.mixes)

    @classmethod
    def of_student(cls, folder: Path, settings: EvalSettings) -> CheckpointSubject:
        tokenizer, (config, _, _) = read_tokenizer(folder, str(folder)), open_folder(folder, str(folder))
        generation = folder / "generation_config.json"
        adapters = adapter_files(folder)
        weights = digest_of([folder / "config.json", *sorted(folder.glob("*.safetensors")), *adapters])
        said = digest_of([generation] if generation.exists() else [])

        def load() -> PreTrainedModel:
            return load_student(folder, getattr(torch, settings.dtype), settings.device)

        key = (weights, _digest(tokenizer), said, *_computed_in(settings))
        return cls(key, Vocabulary.of(config.vocab_size, tokenizer.get_vocab()), tokenizer, load, bool(adapters))

    @classmethod
    def of_dense(cls, model: str, settings: EvalSettings) -> CheckpointSubject:
        source = open_model(model)
        tokenizer, said = source.tokenizer(), source.generation_config().to_json_string()

        def load() -> PreTrainedModel:
            return source.load_model(getattr(torch, settings.dtype), torch.device(settings.device))

        key = (source.fingerprint, _digest(tokenizer), said, *_computed_in(settings))
        return cls(key, Vocabulary.of(source.config.vocab_size, tokenizer.get_vocab()), tokenizer, load)


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 of all files that a tokenizer is saved as, its chat template among them."""
    with TemporaryDirectory(prefix="factorllm-") as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return digest_of(files, " ".join(path.name for path in files).encode())


def _computed_in(settings: EvalSettings) -> tuple[str, str]:
    return settings.dtype, torch.device(settings.device).type
