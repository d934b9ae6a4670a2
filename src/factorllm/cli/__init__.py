"""The command line: one small file a command, all registered here."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import version as installed_version
from typing import Annotated

import typer
from pydantic import ValidationError

from factorllm.cli import terminal
from factorllm.cli.bench import bench
from factorllm.cli.chat import chat
from factorllm.cli.demo import demo
from factorllm.cli.doctor import doctor
from factorllm.cli.evaluate import evaluate
from factorllm.cli.export import export
from factorllm.cli.factorize import factorize
from factorllm.cli.front import front
from factorllm.cli.heal import heal
from factorllm.cli.hosts import hosts
from factorllm.cli.inspect import inspect
from factorllm.cli.make import make
from factorllm.cli.plan import plan
from factorllm.cli.prune import prune
from factorllm.cli.report import report
from factorllm.cli.sample import sample
from factorllm.cli.serve import serve
from factorllm.cli.trim import trim
from factorllm.engines.process import STARTED_WITH
from factorllm.errors import DISK_FULL, FactorLLMError, one_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for _name, _command in {
    "plan": plan,
    "make": make,
    "factorize": factorize,
    "prune": prune,
    "trim": trim,
    "heal": heal,
    "sample": sample,
    "eval": evaluate,
    "inspect": inspect,
    "report": report,
    "hosts": hosts,
    "export": export,
    "bench": bench,
    "front": front,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "doctor": doctor,
}.items():
    app.command(_name)(_command)

_INTERRUPTED = 130  # by Ctrl-C, as shells have it
_RESUMED = ("make", "factorize", "prune", "heal", "sample", "demo", "front", "trim")
_FREE = "free some and repeat the command"
_OPTIONS = {"batches": "batch"}  # given several times, and all in one setting
_UsageError = typer.BadParameter.__base__


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    _: Annotated[bool, typer.Option("--debug", help="Show where a fault of factorllm comes from.")] = False,
) -> None:
    """Turn a dense LLM into a faster sparse Mixture of Experts that every engine already loads."""
    if version:
        typer.echo(f"factorllm {installed_version('factorllm')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point: refusals are one line on stderr and exit code 2, or 75 where to repeat may help; a fault of ours is
    one too, and exit code 1."""
    if not terminal.console.is_terminal:
        terminal.console.width = terminal.WIDE
    with suppress(AttributeError):  # what stands in for a stream may have no coding
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no UTF-8
    os.environ |= STARTED_WITH  # lm-eval starts a Python too
    _end_as_by_ctrl_c()
    try:
        code = app(standalone_mode=False)
    except (FactorLLMError, ValidationError, _UsageError) as error:
        _end(f"error: {_message(error)}", getattr(error, "exit_code", 2))
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            _end(f"error: no space left on the disk of {error.filename or 'what is printed'}; {_FREE}", 2)
        _end(
            f"fault: {type(error).__name__}: {one_line(error)}. This is a fault of factorllm, not of your input: "
            f"`factorllm --debug` before the same command shows where; please report what it prints",
            1,
        )
    _leave_group()
    if code == _INTERRUPTED:
        _end("interrupted; " + _after_interruption(), code)
    raise SystemExit(code)


def _end_as_by_ctrl_c() -> None:
    """Let what stops a service or closes a terminal end a command as Ctrl-C does: no server stays, and no temporary
    files, which may be gigabytes. What goes on where it stopped has none, and may be killed."""
    if _command() not in _RESUMED:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup lets a command go on
                signal.signal(number, signal.default_int_handler)


def _leave_group() -> None:
    """Leave the group of `accelerate launch`: its threads, if they still ran at the end, would abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _after_interruption() -> str:
    if _command() in _RESUMED:
        return "the same command goes on where it stopped"
    return "tasks that were scored are kept" if _command() == "eval" else "nothing was written"


def _command() -> str:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        return f"--{_OPTIONS.get(option, option)}: {problem['msg']}"
    return error.format_message() if isinstance(error, _UsageError) else str(error)


def _end(message: str, code: int) -> None:
    shown = " ".join(message.split()).encode(errors="backslashreplace").decode()  # a path may be no UTF-8
    typer.echo(shown, err=True)
    raise SystemExit(code)
