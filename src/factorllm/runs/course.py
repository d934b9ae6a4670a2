"""Work in several steps: how long all of them will take."""

from __future__ import annotations

import time

_FARTHEST_OFF = 8.0
"""Times that steps may have taken longer or shorter than was expected, for the estimate of those to come."""
_NEARLY_ALL = 0.99


class Course:
    """Steps one after the other, and the time that is left for all of them.

    Args:
        expected: seconds that each step is expected to take; when one has ended, only their proportions count.
    """

    def __init__(self, expected: dict[str, float]):
        self._ahead = dict(expected)
        self._told = self._taken = 0.0  # seconds of the steps that ended: expected, and real
        self._running, self._start = 0.0, 0.0
        self.step: str | None = None

    def start(self, step: str) -> None:
        """The step runs from now on."""
        self.step, self._running, self._start = step, self._ahead.pop(step), time.monotonic()

    def end(self) -> float:
        """The step that runs is done; the seconds that it took."""
        took = self._passed()
        self._told, self._taken = self._told + self._running, self._taken + took
        self.step, self._running = None, 0.0
        return took

    def left(self) -> float:
        """Seconds until all is done, by how far off those of the steps that ended were."""
        off = self._taken / self._told if self._told else 1.0
        off = min(max(off, 1 / _FARTHEST_OFF), _FARTHEST_OFF)
        return off * sum(self._ahead.values()) + max(off * self._running - self._passed(), 0.0)

    def share(self) -> float:
        """Of the time of all steps, what has passed; all of it only when no step is left."""
        if not self._ahead and self.step is None:
            return 1.0
        passed = self._taken + self._passed()
        return min(passed / max(passed + self.left(), 1e-9), _NEARLY_ALL)

    def _passed(self) -> float:
        return time.monotonic() - self._start if self.step else 0.0
