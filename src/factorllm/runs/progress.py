"""Progress of long work: a live bar with the time left in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

_LINE_EVERY_SECONDS = 15


class Meter:
    """Counts steps of one kind of work and shows how long the rest will take.

    Args:
        total: steps in all.
        done: steps that an earlier run has finished; they do not count for the estimate.
    """

    def __init__(self, console: Console, what: str, total: int, done: int = 0):
        self._console, self._what, self._total, self._done = console, what, total, done
        self._before, self._start = done, time.monotonic()
        self._next_line = self._start + _LINE_EVERY_SECONDS
        self._bar = self._new_bar()
        self._task = self._bar.add_task(what, total=total, completed=done)

    def _new_bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
        return Progress(*columns, *left, console=self._console, disable=not self._console.is_terminal)

    def describe(self, what: str) -> None:
        self._what = what
        self._bar.update(self._task, description=what)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._bar.advance(self._task, steps)
        now = time.monotonic()
        if not self._console.is_terminal and now >= self._next_line:
            self._next_line = now + _LINE_EVERY_SECONDS
            left = (now - self._start) / max(self._done - self._before, 1) * (self._total - self._done)
            self._console.print(f"{self._what}: {self._done / self._total:.0%}, about {minutes(left)} left")


@contextmanager
def meter(console: Console, what: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A `Meter` that is shown while the block runs."""
    shown = Meter(console, what, total, done)
    with quiet_transformers(), shown._bar:
        yield shown


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no reports of transformers while the block runs: they would be drawn across ours, and in each log."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Clock:
    """Wall time between laps, in seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        before, self._last = self._last, time.monotonic()
        return self._last - before


def minutes(seconds: float) -> str:
    """A time span as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
