"""`factorllm factorize`"""

from __future__ import annotations

from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Images, MemoryLimit, Model, Out, Resume, Text, in_bytes, settings_from
from factorllm.runs.settings import Settings


@settings_from(Settings, "tokens", "held_out_tokens", "host", "seed", "device", "dtype", "tune", "baseline")
def factorize(
    model: Model,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="S2A2E8, S0A4E8N3, 1R4E2K, cmoe, read-me:K4, or a .yaml file.")
    ] = "S2A2E8",
    text: Text = None,
    images: Images = None,
    memory_limit: MemoryLimit = 0.5,
    resume: Resume = True,
    **chosen,
) -> None:
    """Split every FFN of a dense MODEL into experts and write a sparse checkpoint."""
    from factorllm.convert.factorize import factorize as run
    from factorllm.report.terminal import show_summary

    settings = Settings(**chosen, memory_limit=in_bytes(memory_limit))
    summary = run(
        model, out, recipe, text=text, images=images, settings=settings, overwrite=not resume, console=terminal.console
    )
    if summary:
        show_summary(terminal.console, summary)
