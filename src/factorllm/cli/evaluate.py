"""`factorllm eval`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, names_in, settings_from
from factorllm.measure.settings import EvalSettings


@settings_from(EvalSettings, "data", "limit", "run_generated_code", "device", "dtype")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint that factorllm made, or a .gguf file: asked through llama.cpp.", **IS_PATH),
    ],
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"Tasks of lm-eval, by commas. Default: {','.join(EvalSettings().tasks)}; with --chain none."
        ),
    ] = None,
    chain: Annotated[
        str | None,
        typer.Option(help="YAML file of a chain of questions, or emotion-cause.", metavar="FILE|NAME"),
    ] = None,
    dense_prompt: Annotated[
        bool,
        typer.Option(
            "--dense-prompt", help="Of .gguf files: the model of --against reads the prompts that the student answers."
        ),
    ] = False,
    text: Annotated[str | None, typer.Option(help="Text to measure perplexity and agreement on.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the numbers as JSON.", **IS_PATH)] = None,
    **chosen,
) -> None:
    """Score a checkpoint on benchmark tasks, and show what it kept of the dense model."""
    from dataclasses import asdict

    from factorllm.measure.scores import evaluate as run
    from factorllm.report import SCORES, chain_table, score_table
    from factorllm.runs.disk import explain_full_disk
    from factorllm.runs.output import check_output, located
    from factorllm.runs.workspace import write_json

    if out:
        out = located(out)
        check_output(out, SCORES, [checkpoint, against, chosen["data"], text, chain])
    asked = {} if tasks is None and chain is None else {"tasks": names_in(tasks or "")}
    settings = EvalSettings(**asked, **chosen)
    found = run(
        checkpoint,
        against=against,
        text=text,
        chain=chain,
        dense_prompt=dense_prompt,
        settings=settings,
        console=terminal.console,
    )
    if out:  # first, for nobody may read what is printed
        with explain_full_disk(out, "free some, or choose another -o"):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, asdict(found))
    if found.scores["student"] or found.perplexity:
        terminal.console.print(score_table(found))
    if found.chain:
        terminal.console.print(chain_table(found.chain))
