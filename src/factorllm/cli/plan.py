"""`factorllm plan`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Keep, Memory, Model, Speed, Vocabulary, names_in
from factorllm.planning import TYPES
from factorllm.planning.wish import Wish


def plan(
    model: Model,
    speed: Speed = None,
    keep: Keep = None,
    memory: Memory = None,
    vocabulary: Vocabulary = None,
    types: Annotated[str, typer.Option(help="File types to look at, separated by commas.")] = ",".join(TYPES),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Foretell what the usual shapes of a dense MODEL would cost and give here, before anything is made."""
    from rich.console import Console

    from factorllm.planning.outlook import plan as run
    from factorllm.planning.outlook import times
    from factorllm.planning.show import outlook_table

    wish, kinds = Wish(speed=speed, keep=keep, memory=memory), names_in(types)
    outlook = run(model, kinds, vocabulary, Console(quiet=True) if as_json else terminal.console)
    chosen = [outlook.choose(wish, kind) for kind in kinds] if wish != Wish() else []
    if as_json:
        typer.echo(json.dumps(outlook.as_json() | {"chosen": [one.expected.name for one in chosen]}, indent=2))
        return
    terminal.console.print(outlook_table(outlook))
    if outlook.advice:
        terminal.say(outlook.advice)
    for choice in chosen:
        terminal.say(f"{choice.expected.file_type}: {choice.expected.name}; {times(choice)}")
