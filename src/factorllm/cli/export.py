"""`factorllm export`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, FileType
from factorllm.runs.settings import MOST_TOKENS


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint that factorllm made, or a dense or pruned model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .gguf file to write.", **IS_PATH)],
    file_type: FileType = "q8_0",
    text: Annotated[
        str | None,
        typer.Option(help="Text that says which weights count: .txt, .jsonl, .json, .parquet or a dataset id."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of --text to run.", min=1, max=MOST_TOKENS)] = 65_536,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="Round so that errors are made good on --text: q4_0 and iq4_nl, minutes.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="GGUF file of the dense model to copy the tokenizer from. Default: build it.", **IS_PATH),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that run for a token, where the host leaves that free.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp."""
    from factorllm.exporting import export_gguf

    made = export_gguf(
        model,
        out,
        file_type,
        text=text,
        tokens=tokens,
        gptq=gptq,
        tokenizer=tokenizer,
        top_k=top_k,
        overwrite=overwrite,
        say=terminal.say,
        console=terminal.console,
    )
    if made.importance:
        terminal.say(f"written: {made.importance}, for llama-quantize --imatrix")
    if made.adapters:
        terminal.say(f"written: {len(made.adapters)} adapters, {made.adapters[0]} and so on, for llama-server --lora")
    terminal.console.print(f"written: {made.path} ({made.size / 2**20:.0f} MiB, {file_type})", soft_wrap=True)
