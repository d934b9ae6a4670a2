"""`factorllm trim`"""

from __future__ import annotations

from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import Model, Out, Resume, settings_from
from factorllm.runs.settings import Settings
from factorllm.trimming import COUNTED_TOKENS, VOCABULARY


@settings_from(Settings, "tokens", "held_out_tokens", "seed", tokens=COUNTED_TOKENS)
def trim(
    model: Model,
    out: Out,
    text: Annotated[
        str, typer.Option(help="Text whose tokens are counted: .txt, .jsonl, .json, .parquet or a dataset id.")
    ],
    vocabulary: Annotated[int, typer.Option(help="Tokens that stay.")] = VOCABULARY,
    resume: Resume = True,
    **chosen,
) -> None:
    """Leave out the tokens of a dense MODEL that a kind of text does not use, with their rows of the embedding table
    and the output head; all else stays as it is."""
    from factorllm.trimming.trim import trim as run

    made = run(
        model,
        out,
        vocabulary,
        text,
        settings=Settings(**chosen),
        overwrite=not resume,
        console=terminal.console,
    )
    if made is None:
        terminal.say(f"done already, with the same arguments: {out}")
        return
    before, after = made.vocabulary
    parameters = " -> ".join(f"{count / 1e6:.1f} M" for count in made.parameters)
    terminal.say(f"{before:,} -> {after:,} tokens, {parameters} parameters")
    terminal.say(f"text of the same kind that was not counted takes {made.tokens:.4f} x as many tokens")
    terminal.say(f"written: {made.out}")
