"""`factorllm heal`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, Resume, settings_from
from factorllm.healing.settings import HealSettings


@settings_from(
    HealSettings,
    "tokens", "epochs", "train", "gates", "learning_rate", "router_rate", "coordinate", "temperature", "pa_weight",
    "balance_weight", "label_weight", "hidden_weight", "kinds", "kind_rank", "batch", "micro_batch",
    "quantize", "gradient_checkpointing", "precision", "device",
)  # fmt: skip
def heal(
    student: Annotated[Path, typer.Argument(help="A checkpoint that factorllm made; a static prune too.", **IS_PATH)],
    teacher: Annotated[str, typer.Option(help="The dense model that it was made from.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to. Default: STUDENT-healed.", **IS_PATH)
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to train on, as for factorize.")] = None,
    supervise: Annotated[
        int | None, typer.Option(min=1, help="Run in so many processes, started again when one dies or hangs.")
    ] = None,
    resume: Resume = True,
    **chosen,
) -> None:
    """Fine-tune a STUDENT toward its dense model, by distillation and the Prior-Approximate loss."""
    if supervise:
        _supervise(supervise)
        return
    from factorllm.healing.run import heal as run
    from factorllm.report.terminal import show_healed
    from factorllm.runs.output import located

    student = located(student)
    out = out or student.parent / f"{student.name}-healed"
    settings = HealSettings(**chosen)
    healed = run(student, teacher, out, text=text, settings=settings, overwrite=not resume, console=terminal.console)
    if healed:
        show_healed(terminal.console, healed)


def _supervise(processes: int) -> None:
    """Run this command line, without the option, in processes that are watched."""
    from factorllm.healing.supervise import supervise

    words = sys.argv[1:]
    at = next(number for number, word in enumerate(words) if word.startswith("--supervise"))
    del words[at : at + (1 if "=" in words[at] else 2)]
    if not supervise(words, processes):
        raise SystemExit(2)
