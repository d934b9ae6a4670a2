"""The models of one comparison."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from factorllm.errors import FactorLLMError
from factorllm.exporting import export_gguf
from factorllm.exporting.checkpoints import Checkpoint, open_checkpoint, refuse_unwritable
from factorllm.measure.cost import Cost, cost_of
from factorllm.runs.disk import IN_TMPDIR
from factorllm.student.adapters import refuse_adapters


@dataclass(frozen=True)
class Subject:
    """A model to be timed.

    Attributes:
        name: `student`, `dense` or `pruned`, and a number where there are more.
        model: what it was made of, as it was given.
        path: what the engine loads; a file that was written for the occasion does not stay.
        cost: its parameters and FLOPs by formula.
        size: bytes on disk.
        context: tokens that it reads at most.
    """

    name: str
    model: str
    path: Path
    cost: Cost
    size: int
    context: int

    def ideal_over(self, dense: Subject) -> float:
        """Speed over the dense model's if only the weights that run for a token mattered."""
        return dense.cost.flops_per_token / self.cost.flops_per_token


def open_subjects(
    student: str, against: list[str], engine: str, file_type: str, work: Path, console: Console
) -> list[Subject]:
    """The student and the models that it is compared with, in the form that the engine loads.

    Args:
        against: the dense model first.
        work: folder for GGUF files that have to be written.

    Raises:
        FactorLLMError: when a model cannot be opened, or not be loaded by the engine.
    """
    names = ["student", "dense", *(f"pruned {i}" if len(against) > 2 else "pruned" for i in range(1, len(against)))]
    models = [student, *against]
    checkpoints = [open_timed(model, engine) for model in models]  # any may be refused, and files take their time
    return [
        prepare_subject(name, model, checkpoint, engine, file_type, work, console)
        for name, model, checkpoint in zip(names, models, checkpoints, strict=True)
    ]


def open_timed(model: str, engine: str) -> Checkpoint:
    """Open a model that is to be timed.

    Raises:
        FactorLLMError: as `open_checkpoint`; when it has adapters, or no form that the engine loads.
    """
    refuse_adapters(Path(model), "they would not be timed: give the student that it was made of")
    checkpoint = open_checkpoint(model)
    if engine == "llamacpp":
        refuse_unwritable(checkpoint, model)
    elif not Path(model).is_dir():
        raise FactorLLMError(f"{engine} is given folders, and {model} is none; save the model with save_pretrained()")
    return checkpoint


def prepare_subject(
    name: str,
    model: str,
    checkpoint: Checkpoint,
    engine: str,
    file_type: str,
    work: Path,
    console: Console,
    when_full: str = IN_TMPDIR,
    **weighted: Any,
) -> Subject:
    """A model in the form that the engine loads; `open_subjects` says more.

    Args:
        checkpoint: the model, as `open_timed` opened it.
        when_full: what to do when the disk of `work` is.
        weighted: how `export_gguf` weighs what counts.
    """
    cost = cost_of(checkpoint.config, checkpoint.host.shape(checkpoint.config))
    path = Path(model)
    if engine == "llamacpp":
        path = work / f"{name.replace(' ', '-')}-{file_type}.gguf"
        say = partial(console.print, highlight=False, soft_wrap=True, markup=False)  # brackets are parts of names
        say(f"writing {model} as {path.name}")
        export_gguf(model, path, file_type, say=say, console=console, when_full=when_full, **weighted)
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))
    return Subject(name, model, path, cost, size, checkpoint.config.max_position_embeddings)
