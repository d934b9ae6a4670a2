"""Hangs: where no sign of life comes for ten times a step's time, the stacks of all threads are written to a log and
the process ends (the standard library's `faulthandler`, whose watch needs no interpreter that still runs).

Torch's elastic agent, which started it, starts it again. What waits for a process that was stopped hangs too.
"""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from statistics import median

from transformers import TrainerCallback

_STEPS = 10
_LEAST_SECONDS = 30.0  # a machine may be busy
_LONG_SECONDS = 600.0  # before steps were timed, and for writing a checkpoint
_WINDOW = 64
_FEWEST = 3


def is_supervised() -> bool:
    """Whether an agent started this process, and would start it again."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ


class HangWatch(TrainerCallback):
    """Ends the process where training hangs.

    Args:
        log: that the stacks are added to.
    """

    def __init__(self, log: Path):
        self._log = log.open("a", encoding="utf-8")
        self._times: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()
        self._watch(self.limit)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self._times, self._last = [*self._times, now - self._last][-_WINDOW:], now
        self._watch(self.limit)

    def on_substep_end(self, args, state, control, **kwargs):
        self._watch(self.limit)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._watch(self.limit)

    def on_evaluate(self, args, state, control, **kwargs):
        self._last = time.monotonic()
        self._watch(_LONG_SECONDS)

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
        self._watch(self.limit)

    def end(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    @property
    def limit(self) -> float:
        """Seconds without a sign of life that are a hang."""
        if len(self._times) < _FEWEST:
            return _LONG_SECONDS
        return max(_STEPS * median(self._times), _LEAST_SECONDS)

    def _watch(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._log)
