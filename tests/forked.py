"""Commands in processes of their own, forked from one that has imported what they import, which takes each of them
several seconds of its own otherwise."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "factorllm.cli",
        "factorllm.convert.factorize",
        "factorllm.convert.partition.balanced",
        "factorllm.healing.run",
        "ot",
        "transformers.models.granitemoeshared.modeling_granitemoeshared",
        "transformers.models.llama.modeling_llama",
    ]
)


def run_main(words: list[str]) -> None:
    """`factorllm` with these words."""
    from factorllm.cli import main

    sys.argv = ["factorllm", *words]
    main()


class Forked:
    """A function in a process of its own, with the methods of `subprocess.Popen` that tests use.

    Args:
        function: one of a module, for it is found by its name.
        environment: what differs from this process's.
        own_session: whether its children can be ended with it, by `killpg`.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: object,
        environment: dict[str, str] | None = None,
        own_session: bool = False,
    ):
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115  as long as this is there
        names = [file.name for file in self._files]
        start = (os.environ | (environment or {}), os.getcwd(), names, own_session, function, arguments)
        self._process = _CONTEXT.Process(target=_begin, args=start)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> tuple[str, str]:
        """What is on stdout and on stderr so far."""
        return tuple(Path(file.name).read_text() for file in self._files)


def _begin(environment, folder, names, own_session, function, arguments) -> None:
    """Make a fork what a process is that a shell starts."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if own_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, name in enumerate(names, start=1):  # stdout and stderr
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    function(*arguments)


def command(*words: object, **options) -> Forked:
    """`factorllm` with these words, as `python -m factorllm` would run it."""
    return Forked(run_main, [str(word) for word in words], **options)


def ended(process: Forked) -> subprocess.CompletedProcess:
    """The process when it has ended, as `subprocess.run` gives it."""
    code = process.wait()
    return subprocess.CompletedProcess([], code, *process.said())


_ASKS = """#!{python} -ES
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    code, *said = json.load(server.makefile())
for stream, text in zip((sys.stdout, sys.stderr), said):
    stream.write(text)
sys.exit(code)
"""


@contextmanager
def program(run: Callable[[list[str]], None] = run_main) -> Iterator[Path]:
    """A folder for PATH with `factorllm` in it, a program whose every call is forked; Python runs it too."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            words, environment = json.load(self.rfile)
            done = ended(Forked(run, words, environment=environment))
            self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())

    with tempfile.TemporaryDirectory() as folder:
        address, asks = f"{folder}/socket", Path(folder, "factorllm")
        asks.write_text(_ASKS.format(python=sys.executable, address=address))
        asks.chmod(0o755)
        with socketserver.ThreadingUnixStreamServer(address, Answer) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            yield Path(folder)
            server.shutdown()


def both(*words: object, run: Callable[[list[str]], None] = run_main) -> subprocess.CompletedProcess:
    """`factorllm` in two processes that share the work, as torchrun or `accelerate launch` would start them."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    given = [str(word) for word in words]
    started = [Forked(run, given, environment=group | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    first, second = map(ended, started)
    code = first.returncode or second.returncode
    return subprocess.CompletedProcess([], code, first.stdout + second.stdout, first.stderr + second.stderr)


def free_port() -> int:
    """A port that no one listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
