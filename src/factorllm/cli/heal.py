"""`factorllm heal`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, Resume, settings_from
from factorllm.healing.settings import HealSettings


@settings_from(
    HealSettings,
    "tokens", "epochs", "train", "gates", "learning_rate", "temperature", "pa_weight", "balance_weight", "label_weight",
    "hidden_weight", "kinds", "kind_rank", "batch", "micro_batch", "gradient_checkpointing", "precision", "device",
)  # fmt: skip
def heal(
    student: Annotated[Path, typer.Argument(help="A checkpoint that factorllm made; a static prune too.", **IS_PATH)],
    teacher: Annotated[str, typer.Option(help="The dense model that it was made from.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to. Default: STUDENT-healed.", **IS_PATH)
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to train on, as for factorize.")] = None,
    resume: Resume = True,
    **chosen,
) -> None:
    """Fine-tune a STUDENT toward its dense model, by distillation and the Prior-Approximate loss."""
    from factorllm.healing.run import heal as run
    from factorllm.report.terminal import show_healed
    from factorllm.runs.output import located

    student = located(student)
    out = out or student.parent / f"{student.name}-healed"
    settings = HealSettings(**chosen)
    healed = run(student, teacher, out, text=text, settings=settings, overwrite=not resume, console=terminal.console)
    if healed:
        show_healed(terminal.console, healed)
