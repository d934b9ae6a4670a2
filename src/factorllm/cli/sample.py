"""`factorllm sample`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, Model, Resume, settings_from
from factorllm.runs.settings import Settings


@settings_from(Settings, "tokens", "length", "seed", "device", tokens=200_000, length=256)
def sample(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .jsonl file to write, for --text.", **IS_PATH)],
    temperature: Annotated[float, typer.Option(help="Below 1: surer of itself and more fluent.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations in the model's chat template, questions and answers.")
    ] = False,
    resume: Resume = True,
    **chosen,
) -> None:
    """Write text that a dense MODEL says by itself, to calibrate and heal on what it knows."""
    from factorllm.text.sample import sample as run

    path = run(
        model,
        out,
        temperature=temperature,
        chat=chat,
        settings=Settings(**chosen),
        overwrite=not resume,
        console=terminal.console,
    )
    terminal.say(f"written: {path}")
