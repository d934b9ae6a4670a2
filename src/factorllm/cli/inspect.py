"""`factorllm inspect`"""

from __future__ import annotations

from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Made


def inspect(
    checkpoint: Made,
    prompt: Annotated[
        str | None, typer.Option(help="Show instead which experts run for each token of this text.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to show for --prompt. Default: the middle one.")] = None,
) -> None:
    """Show what a checkpoint was made from, what it cost, and its layers."""
    from factorllm.measure.routing import route_prompt
    from factorllm.report.terminal import show_provenance, show_routing
    from factorllm.student.read import read_provenance

    made = read_provenance(checkpoint)
    if prompt is None:
        show_provenance(terminal.console, checkpoint, made)
    else:
        show_routing(terminal.console, route_prompt(checkpoint, prompt, layer))
