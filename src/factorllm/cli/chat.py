"""`factorllm chat`"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, FileType, settings_from
from factorllm.serving.settings import ServeSettings


@settings_from(ServeSettings, "context", "threads")
def chat(
    model: Annotated[
        Path, typer.Argument(help="What factorllm made: a folder of `make`, a checkpoint, or a .gguf.", **IS_PATH)
    ],
    against: Annotated[str | None, typer.Option(help="Let the dense model answer too, below.")] = None,
    file_type: FileType = "q8_0",
    **chosen,
) -> None:
    """Talk to a MODEL in the terminal, and on demand to its dense model at the same time."""
    from factorllm.engines.llamacpp import require_llamacpp
    from factorllm.exporting.ready import as_gguf
    from factorllm.serving.chat import Chat

    settings = ServeSettings(**chosen)
    require_llamacpp()
    with tempfile.TemporaryDirectory(prefix="factorllm-chat-") as work:
        files = {"student": as_gguf(str(model), file_type, Path(work), terminal.say)}
        if against:
            files["dense"] = as_gguf(against, file_type, Path(work), terminal.say)
        chats = {name: Chat(path, settings) for name, path in files.items()}
        terminal.say("an empty line ends the conversation")
        while question := _question():
            for name, one in chats.items():
                if len(chats) > 1:
                    terminal.say(f"[{name}]")
                for piece in one.ask(question):
                    terminal.console.print(piece, end="", soft_wrap=True, highlight=False)
                terminal.say("")


def _question() -> str:
    try:
        return terminal.console.input("> ").strip()
    except EOFError:
        return ""
