"""Progress of long work: a live bar with the time left in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers.utils import logging

from factorllm.runs.course import Course

_LINE_EVERY_SECONDS = 15
_COURSE = "course"


class _TimeLeft(TimeRemainingColumn):
    """Of a bar by its pace, of a course as it says itself."""

    def render(self, task: Task) -> Text:
        if _COURSE not in task.fields:
            return super().render(task)
        return Text(minutes(task.fields[_COURSE].left()), style="progress.remaining")


class _Bars(Progress):
    """The bars of a terminal; nothing is drawn elsewhere."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        left = (TextColumn("left"), _TimeLeft(elapsed_when_finished=False))
        super().__init__(*columns, *left, console=console, disable=not console.is_terminal)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            if course := task.fields.get(_COURSE):
                task.completed = course.share()
        return super().get_renderables()


_shown: WeakKeyDictionary[Console, _Bars] = WeakKeyDictionary()
"""What each terminal shows now: work within other work adds its bar there."""


@contextmanager
def _bars_of(console: Console) -> Iterator[_Bars]:
    if console in _shown:
        yield _shown[console]
        return
    with _Bars(console) as bars:
        _shown[console] = bars
        try:
            yield bars
        finally:
            del _shown[console]


@contextmanager
def show_course(console: Console, what: str, course: Course) -> Iterator[None]:
    """A bar over all steps of a course, above those of the step that runs, while the block does."""
    with _bars_of(console) as bars:
        bars.add_task(what, total=1.0, course=course)
        yield


class Meter:
    """Counts steps of one kind of work and shows how long the rest will take.

    Args:
        bars: where it is drawn.
        total: steps in all.
        done: steps that an earlier run has finished; they do not count for the estimate.
    """

    def __init__(self, bars: Progress, what: str, total: int, done: int = 0):
        self._bars, self._console, self._what, self._total, self._done = bars, bars.console, what, total, done
        self.begin()
        self._next_line = self._start + _LINE_EVERY_SECONDS
        self.task = bars.add_task(what, total=total, completed=done)

    def begin(self) -> None:
        """Leave what was done until now, and the time that it took, out of the estimate."""
        self._before, self._start = self._done, time.monotonic()

    def describe(self, what: str) -> None:
        self._what = what
        self._bars.update(self.task, description=what)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._bars.advance(self.task, steps)
        now = time.monotonic()
        if not self._console.is_terminal and now >= self._next_line:
            self._next_line = now + _LINE_EVERY_SECONDS
            left = (now - self._start) / max(self._done - self._before, 1) * (self._total - self._done)
            self._console.print(f"{self._what}: {self._done / self._total:.0%}, about {minutes(left)} left")


@contextmanager
def meter(console: Console, what: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A `Meter` that is shown while the block runs."""
    within = console in _shown
    with quiet_transformers(), _bars_of(console) as bars:
        shown = Meter(bars, what, total, done)
        try:
            yield shown
        finally:
            if within:
                bars.remove_task(shown.task)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no reports of transformers while the block runs: they would be drawn across ours, and in each log.
    What it fails of is raised too."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
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
