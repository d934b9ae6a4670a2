"""Serving a model for each kind of text at one address: a request's kind is chosen from its prompt, its turn by the
schedule, and llama.cpp's own servers answer."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from factorllm.engines.llamacpp import require_llamacpp
from factorllm.exporting.ready import as_gguf
from factorllm.runs.output import KINDS
from factorllm.serving.backend import Backend
from factorllm.serving.proxy import Front, UnavailableError, check_free, serve_front, text_of
from factorllm.serving.schedule import Load, Schedule, Start
from factorllm.serving.settings import ServeSettings
from factorllm.text.intuition import Intuition


class KindFront(Front):
    """A llama.cpp server for each kind of text, of which as many are loaded as fit.

    Args:
        name: for /v1/models.
        gguf_files: one a kind.
    """

    def __init__(self, name: str, gguf_files: list[Path], intuition: Intuition, settings: ServeSettings):
        self.name, self._files, self._intuition, self._settings = name, gguf_files, intuition, settings
        in_memory = min(settings.in_memory or len(gguf_files), len(gguf_files))
        self._schedule = Schedule(len(gguf_files), in_memory, settings.parallel, settings.wait_limit, settings.policy)
        self._lock, self._tickets = threading.Lock(), count()
        self._turns: dict[int, tuple[int, Future[Backend]]] = {}
        self._backends: dict[int, Backend] = {}
        self._closed = False

    @contextmanager
    def place(self, path: str, body: dict) -> Iterator[tuple[str, dict]]:
        kind, turn = int(self._intuition.probabilities(text_of(body)).argmax()), Future()
        with self._lock:
            ticket = next(self._tickets)
            self._turns[ticket] = kind, turn
            self._schedule.arrive(ticket, kind, time.monotonic())
            self._act()
        try:
            yield turn.result().address, body
        finally:
            with self._lock:
                del self._turns[ticket]
                self._schedule.finished(ticket)
                if kind in self._backends and not self._backends[kind].is_alive:
                    self._backends.pop(kind).close()
                    self._schedule.lost(kind)
                self._act()

    def metrics(self) -> str:
        with self._lock:
            schedule = self._schedule
            waits, there = schedule.waits, schedule.there
            by_kind = {"started_total": schedule.started, "waiting": schedule.queued, "running": schedule.running}
            by_kind["in_memory"] = [int(kind in there) for kind in range(len(self._files))]
            totals = {"hits": schedule.hits, "misses": schedule.misses, "loads": schedule.loads}
            lines = [f"factorllm_{name}_total {value}" for name, value in totals.items()]
            lines += [f"factorllm_wait_seconds_count {len(waits)}", f"factorllm_wait_seconds_sum {sum(waits):.6f}"]
            lines += [f"factorllm_wait_seconds_max {max(waits, default=0):.6f}"]
        for name, values in by_kind.items():
            lines += [f'factorllm_{name}{{kind="{kind}"}} {value}' for kind, value in enumerate(values)]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """End all servers."""
        with self._lock:
            self._closed = True
            for backend in self._backends.values():
                backend.close()

    def _act(self) -> None:
        """Do what the schedule says; the lock is held."""
        for action in self._schedule.act(time.monotonic()):
            if isinstance(action, Start):
                kind, turn = self._turns[action.request]
                turn.set_result(self._backends[kind])
            elif isinstance(action, Load):
                threading.Thread(target=self._load, args=(action.kind,), daemon=True).start()
            else:
                self._backends.pop(action.kind).close()

    def _load(self, kind: int) -> None:
        try:
            backend = Backend(self._files[kind], self._settings.options, self.name)
        except Exception as error:  # whatever it is, those who wait must hear of it
            with self._lock:
                for ticket in self._schedule.failed(kind):
                    self._turns[ticket][1].set_exception(UnavailableError(str(error)))
                self._act()
            return
        with self._lock:
            if self._closed:
                backend.close()
                return
            self._backends[kind] = backend
            self._schedule.loaded(kind)
            self._act()


def serve_kinds(folder: Path, file_type: str, settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve what `factorize --recipe read-me:K4` made, until interrupted.

    Raises:
        FactorLLMError: when llama.cpp is not installed, a part is damaged, or nothing can listen at the address.
    """
    require_llamacpp()
    intuition = Intuition.load(folder)
    check_free(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="factorllm-serve-") as work:
        checkpoints = [folder / KINDS / str(kind) for kind in range(intuition.kinds)]
        files = [as_gguf(str(checkpoint), file_type, Path(work), say) for checkpoint in checkpoints]
        front = KindFront(folder.resolve().name, files, intuition, settings)
        try:
            serve_front(front, settings.host, settings.port, folder, say)
        finally:
            front.close()
        say("stopped")
