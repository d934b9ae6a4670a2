"""`factorllm bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, FileType, settings_from
from factorllm.measure.speed.plan import Plan


@settings_from(Plan, "rounds", "dtype", "experts")
def bench(
    student: Annotated[str, typer.Argument(help="A checkpoint that factorllm made.")],
    against: Annotated[list[str], typer.Option(help="The dense model; again for a static prune (recipe S4A0E8 ...).")],
    engine: Annotated[str, typer.Option(help="llamacpp, transformers or vllm.")] = "llamacpp",
    file_type: FileType = "q8_0",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences that decode at once. Default: 1 and 8.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Thread counts to choose from. Default: powers of two up to all cores.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for speed.json and speed.png.", **IS_PATH)
    ] = None,
    **chosen,
) -> None:
    """Time a student, its dense model and its static prune in turns, in one engine; llama.cpp has all in one --type,
    .gguf files too."""
    from factorllm.measure.speed.run import run_bench

    plan = Plan(**chosen, batches=tuple(batch or Plan().batches), threads=tuple(threads or ()))
    console = terminal.console
    console.print(run_bench(student, against, engine, file_type, plan, out, console))
