"""`factorllm prune`"""

from __future__ import annotations

from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Images, MemoryLimit, Model, Out, Resume, Text, in_bytes, settings_from
from factorllm.runs.settings import Settings


@settings_from(Settings, "tokens", "held_out_tokens", "seed", "device", "dtype", "tune")
def prune(
    model: Model,
    out: Out,
    keep: Annotated[float, typer.Option(help="Share of each FFN's neurons that stays.")] = 0.5,
    text: Text = None,
    images: Images = None,
    memory_limit: MemoryLimit = 0.5,
    resume: Resume = True,
    **chosen,
) -> None:
    """Keep the neurons of each FFN of a dense MODEL that count most, and repair the rest: the same architecture,
    narrower."""
    from factorllm.convert.factorize import factorize
    from factorllm.dense import open_model
    from factorllm.dense.families import ffn_width
    from factorllm.recipe import prune_recipe
    from factorllm.report.terminal import show_summary

    recipe = prune_recipe(keep, ffn_width(open_model(model).config))
    settings = Settings(**chosen, memory_limit=in_bytes(memory_limit), baseline=False)
    summary = factorize(
        model, out, recipe, text=text, images=images, settings=settings, overwrite=not resume, console=terminal.console
    )
    if summary:
        show_summary(terminal.console, summary)
