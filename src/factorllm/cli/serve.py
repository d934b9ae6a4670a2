"""`factorllm serve`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, FileType, settings_from
from factorllm.serving.settings import ServeSettings


@settings_from(ServeSettings, "host", "port", "context", "parallel", "threads", "in_memory", "policy", "wait_limit")
def serve(
    model: Annotated[
        str, typer.Argument(help="A checkpoint that factorllm made, one for each kind of text, or a .gguf file.")
    ],
    engine: Annotated[
        str, typer.Option(help="llamacpp or vllm. Default: vllm for folders where there is a GPU.")
    ] = "auto",
    file_type: FileType = "q8_0",
    lossless: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="Serve the dense model, and let MODEL draft for it where that is measured to pay (llama.cpp).",
        ),
    ] = None,
    retrieval: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            parser=IS_PATH["parser"],
            help="Text files whose passages the model is given where it finds that they help (llama.cpp).",
        ),
    ] = None,
    dense_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="DENSE",
            help="The dense model, which reads the prompts that MODEL answers: nearer to it (llama.cpp).",
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=IS_PATH["parser"],
            help="The mmproj file of the dense model, if that takes images: images are answered too (llama.cpp).",
        ),
    ] = None,
    **chosen,
) -> None:
    """Serve a model to OpenAI clients, by the engine's own server."""
    from factorllm.serving.serve import serve as run

    run(model, engine, file_type, ServeSettings(**chosen), terminal.say, lossless, retrieval, dense_prompt, mmproj)
