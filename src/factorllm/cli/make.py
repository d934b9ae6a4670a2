"""`factorllm make`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, FileType, Keep, Memory, Speed, Text, Time, Vocabulary
from factorllm.errors import FactorLLMError
from factorllm.planning.wish import Wish

if TYPE_CHECKING:
    from factorllm.making.run import Made


def make(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder of safetensors, .gguf file, or a plan.yaml.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for all that is made.", **IS_PATH)] = None,
    speed: Speed = None,
    keep: Keep = None,
    time: Time = None,
    memory: Memory = None,
    text: Text = None,
    vocabulary: Vocabulary = None,
    effort: Annotated[str, typer.Option(help="How much text and healing.", metavar="quick|standard|best")] = "standard",
    file_type: FileType = "q8_0",
) -> None:
    """Make a model that can be used, from a wish or from a plan.yaml: every step from the text to the report."""
    from factorllm.making.run import make as run
    from factorllm.making.run import make_planned

    wish, console = Wish(speed=speed, keep=keep, time=time, memory=memory), terminal.console
    if Path(model).suffix in {".yaml", ".yml"}:
        if given := [f"--{name.replace('file_', '')}" for name in context.params if _is_given(context, name)]:
            raise FactorLLMError(
                f"{model} says it all, so {given[0]} would be left out: edit it there, and give nothing beside it but "
                "-o"
            )
        made = make_planned(model, out, console)
    elif out is None:
        raise FactorLLMError("say where to write with -o")
    else:
        how = {"vocabulary": vocabulary, "effort": effort, "file_type": file_type}
        made = run(model, out, wish=wish, text=text, **how, console=console)
    show_made(made)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option beside a plan and -o stands on the command line, were it what it is without."""
    source = context.get_parameter_source(name)
    return name not in ("model", "out") and source is not None and source.name == "COMMANDLINE"


def show_made(made: Made) -> None:
    """The numbers that count, and how to use what was made."""
    for value, what in made.numbers:
        terminal.say(f"{value:>10}  {what}")
    terminal.say(f"report: {made.out / 'report' / 'index.html'}")
    for command in made.commands:
        terminal.say(command)
