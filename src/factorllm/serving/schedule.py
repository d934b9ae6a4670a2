"""Which request runs next and which models are in memory, where more models are served than fit. No threads and no
clock are in here: it is told what happens and when, and says what to do.

Expert-aware batching of Read-ME (arXiv 2410.19123): each request is of one kind, each kind has a model and a queue; the
longest queue is taken until the slots are full. The paper has no limit on waiting; here a request that has waited for
half of the limit goes first, the oldest of them before all. Until its model is loaded those that are in memory go on:
else, where many wait that long, a model would be loaded for each. What is needed next is known from the queues, so the
model that leaves memory is the one that is needed last (Belady 1966).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

Policy = Literal["belady", "lru", "fifo"]
"""Which model leaves memory: the one that the queues need last, or the one that was used last longest ago. `fifo` takes
requests one after another as they came, whatever their kind, and the model used longest ago leaves."""


@dataclass(frozen=True)
class Start:
    """Send this request to its kind's model now."""

    request: Hashable


@dataclass(frozen=True)
class Load:
    """Load this kind's model; say `loaded` when it is there."""

    kind: int


@dataclass(frozen=True)
class Unload:
    """Remove this kind's model from memory; nothing runs on it."""

    kind: int


Action = Start | Load | Unload


@dataclass(frozen=True)
class _Waiting:
    request: Hashable
    since: float


class Schedule:
    """Requests of K kinds on at most `in_memory` models.

    Args:
        parallel: requests that run at once, of all kinds together.
        limit: seconds that no request should wait; one that has waited for half as long goes first.

    Attributes:
        hits, misses: requests whose model was in memory when their turn came, and those it had to be loaded for.
        started: requests that were sent on, by kind.
        loads: models that were loaded, or began to be.
        waits: seconds that each request waited that was started so far.
    """

    def __init__(self, kinds: int, in_memory: int, parallel: int, limit: float = 30.0, policy: Policy = "belady"):
        self._queues: list[deque[_Waiting]] = [deque() for _ in range(kinds)]
        self._in_memory, self._parallel, self._limit, self._policy = in_memory, parallel, limit, policy
        self._running: dict[Hashable, int] = {}
        self._there: set[int] = set()
        self._loading: int | None = None
        self._leaving: int | None = None  # as soon as nothing runs on it
        self._missed: set[Hashable] = set()
        self._used = [-1] * kinds  # when a kind was used or loaded last, by the number of starts
        self.hits, self.misses, self.loads = 0, 0, 0
        self.started = [0] * kinds
        self.waits: list[float] = []

    @property
    def queued(self) -> list[int]:
        """Requests that wait, by kind."""
        return [len(queue) for queue in self._queues]

    @property
    def running(self) -> list[int]:
        """Requests that run, by kind."""
        return [list(self._running.values()).count(kind) for kind in range(len(self._queues))]

    @property
    def there(self) -> frozenset[int]:
        """Kinds whose models are in memory or on their way."""
        return frozenset(self._there | ({self._loading} - {None}))

    def arrive(self, request: Hashable, kind: int, now: float) -> None:
        """A request is there."""
        self._queues[kind].append(_Waiting(request, now))

    def loaded(self, kind: int) -> None:
        """A model is in memory."""
        self._there.add(kind)
        self._loading = None
        self._used[kind] = len(self.waits)  # else it would be the first to leave, before it was of use

    def lost(self, kind: int) -> None:
        """A model that was in memory is no longer: its process has ended."""
        self._there.discard(kind)
        if self._leaving == kind:
            self._leaving = None

    def failed(self, kind: int) -> list[Hashable]:
        """A model could not be loaded; the requests that wait for it, which are given up."""
        self._loading = None
        given_up = [waiting.request for waiting in self._queues[kind]]
        self._queues[kind].clear()
        return given_up

    def finished(self, request: Hashable) -> None:
        """A request was answered, or given up by its client, whether it ran or not."""
        self._missed.discard(request)
        if self._running.pop(request, None) is None:
            for queue in self._queues:
                for waiting in [each for each in queue if each.request == request]:
                    queue.remove(waiting)

    def act(self, now: float) -> list[Action]:
        """What is to be done now; to be asked after each thing that happened."""
        actions: list[Action] = []
        self._unload(actions)
        while len(self._running) < self._parallel and (kind := self._startable(now)) is not None:
            actions.append(self._start(kind, now))
        if (kind := self._wanted(now)) is not None:
            self._make_room(now)
            self._unload(actions)
            if self._has_room():
                self._loading = kind
                self.loads += 1
                self._missed.add(self._queues[kind][0].request)
                actions.append(Load(kind))
        return actions

    def _order(self, now: float) -> list[int]:
        """Kinds with requests that wait, in the order in which they get their turn."""

        def place(kind: int) -> tuple[float, ...]:
            since = self._queues[kind][0].since
            if self._policy == "fifo" or self._is_urgent(kind, now):
                return 0, since, kind
            return 1, -len(self._queues[kind]), since, kind

        return sorted((kind for kind, queue in enumerate(self._queues) if queue), key=place)

    def _is_urgent(self, kind: int, now: float) -> bool:
        queue = self._queues[kind]
        return bool(queue) and now - queue[0].since >= self._limit / 2

    def _startable(self, now: float) -> int | None:
        """The kind whose request starts next. While a model is loaded for another, those that are there go on."""
        for kind in self._order(now):
            if kind in self._there and kind != self._leaving:
                return kind
            if self._policy == "fifo":
                return None
        return None

    def _wanted(self, now: float) -> int | None:
        """The kind whose model is to be loaded: the next that gets its turn, or any that waits while there is room."""
        if self._loading is not None:
            return None
        order = self._order(now)
        absent = [kind for kind in order if kind not in self._there or kind == self._leaving]
        if absent and absent[0] != self._leaving and (absent[0] == order[0] or self._has_room()):
            return absent[0]
        return None

    def _make_room(self, now: float) -> None:
        if self._has_room() or self._leaving is not None:
            return
        needed = {kind: place for place, kind in enumerate(self._order(now))}

        def worth(kind: int) -> tuple[float, int]:
            last_needed = needed.get(kind, math.inf) if self._policy == "belady" else 0
            return -last_needed, self._used[kind]

        self._leaving = min(self._there, key=worth)

    def _unload(self, actions: list[Action]) -> None:
        if self._leaving is not None and self._leaving not in self._running.values():
            actions.append(Unload(self._leaving))
            self._there.remove(self._leaving)
            self._leaving = None

    def _has_room(self) -> bool:
        return len(self._there) < self._in_memory

    def _start(self, kind: int, now: float) -> Start:
        waiting = self._queues[kind].popleft()
        self._running[waiting.request] = kind
        self._used[kind] = len(self.waits)
        self.started[kind] += 1
        self.waits.append(now - waiting.since)
        if waiting.request in self._missed:
            self._missed.remove(waiting.request)
            self.misses += 1
        else:
            self.hits += 1
        return Start(waiting.request)
