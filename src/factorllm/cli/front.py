"""`factorllm front`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, names_in, settings_from
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.settings import EvalSettings

_OF_TASKS = ("data", "limit", "run_generated_code")


@settings_from(FrontPlan, "importance_tokens", "gptq", "perplexity_tokens", "rounds", "threads")
@settings_from(EvalSettings, *_OF_TASKS)
def front(
    students: Annotated[list[str], typer.Argument(help="Checkpoints that factorllm made, trimmed models too.")],
    against: Annotated[list[str], typer.Option(help="The dense model; again for a static prune.")],
    text: Annotated[str, typer.Option(help="Text to weigh by and to measure perplexity on, each on its own part.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the files and the numbers.", **IS_PATH)],
    types: Annotated[str, typer.Option(help="Types of files, separated by commas.")] = ",".join(FrontPlan().types),
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval that each file is asked, separated by commas.")] = "",
    **chosen,
) -> None:
    """Put students beside all that quantising their dense model gives: size, speed and quality of each file."""
    from factorllm.measure.front.run import run_front
    from factorllm.measure.front.show import front_table

    asked = {name: chosen.pop(name) for name in _OF_TASKS}
    settings = EvalSettings(tasks=names_in(tasks), **asked)
    plan = FrontPlan(types=names_in(types), **chosen)
    console = terminal.console
    console.print(front_table(run_front(students, against, text, out, plan, settings, console=console)))
