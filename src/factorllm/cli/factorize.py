"""`factorllm factorize`"""

from __future__ import annotations

from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Model, Out, Resume, Text, settings_from
from factorllm.runs.settings import Settings

_MOST_GIB = 2.0**31  # more than the settings take, which refuse it


@settings_from(Settings, "tokens", "host", "seed", "device", "dtype", "tune", "baseline")
def factorize(
    model: Model,
    out: Out,
    recipe: Annotated[str, typer.Option(help="S2A2E8, S0A4E8N3, 1R4E2K, cmoe, or a .yaml file.")] = "S2A2E8",
    text: Text = None,
    memory_limit: Annotated[
        float, typer.Option(help="GiB that one kind of a layer's activations may take before it spills to disk.")
    ] = 0.5,
    resume: Resume = True,
    **chosen,
) -> None:
    """Split every FFN of a dense MODEL into experts and write a sparse checkpoint."""
    from factorllm.convert.factorize import factorize as run
    from factorllm.report.terminal import show_summary

    settings = Settings(**chosen, memory_limit=min(memory_limit, _MOST_GIB) * 2**30 // 1)
    summary = run(model, out, recipe, text=text, settings=settings, overwrite=not resume, console=terminal.console)
    if summary:
        show_summary(terminal.console, summary)
