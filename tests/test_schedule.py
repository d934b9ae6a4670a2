"""Which request runs next, and which models are in memory: simulated, without a clock."""

from __future__ import annotations

import heapq
import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factorllm.serving.schedule import Load, Schedule, Start, Unload

Arrivals = list[tuple[float, int]]


def simulate(schedule: Schedule, arrivals: Arrivals, in_memory: int, parallel: int, run=1.0, load=1.0) -> list[float]:
    """Run the requests, (time, kind) each, to their end; what each one waited, in their order."""
    order = count()
    events = [(time, next(order), "arrive", number) for number, (time, _) in enumerate(arrivals)]
    heapq.heapify(events)
    waits: dict[int, float] = {}
    memory: set[int] = set()
    running: dict[int, int] = {}
    loading = 0
    while events:
        now, _, what, which = heapq.heappop(events)
        if what == "arrive":
            schedule.arrive(which, arrivals[which][1], now)
        elif what == "loaded":
            memory.add(which)
            loading -= 1
            schedule.loaded(which)
        else:
            del running[which]
            schedule.finished(which)
        for action in schedule.act(now):
            if isinstance(action, Start):
                kind = arrivals[action.request][1]
                assert kind in memory
                assert action.request not in waits
                running[action.request] = kind
                waits[action.request] = now - arrivals[action.request][0]
                heapq.heappush(events, (now + run, next(order), "finished", action.request))
            elif isinstance(action, Unload):
                assert action.kind not in running.values()
                memory.remove(action.kind)
            else:
                loading += 1
                heapq.heappush(events, (now + load, next(order), "loaded", action.kind))
            assert len(memory) + loading <= in_memory
            assert len(running) <= parallel
    return [waits[number] for number in range(len(arrivals))]


KINDS = 4
requests = st.lists(st.tuples(st.floats(0, 40), st.integers(0, KINDS - 1)), max_size=40)


@given(requests, st.integers(1, KINDS), st.integers(1, 4), st.sampled_from(["belady", "lru", "fifo"]), st.floats(0, 20))
def test_every_request_is_answered_in_the_memory_and_slots_that_there_are(arrivals, in_memory, parallel, policy, limit):
    schedule = Schedule(KINDS, in_memory, parallel, limit, policy)
    waits = simulate(schedule, arrivals, in_memory, parallel)  # which looks at each action
    assert len(waits) == len(arrivals) == schedule.hits + schedule.misses
    assert schedule.queued == schedule.running == [0] * KINDS
    assert sorted(schedule.waits) == pytest.approx(sorted(waits))


@pytest.mark.parametrize(
    ("policy", "at_once", "later"),
    [("belady", [], [Unload(1), Start("last"), Load(2)]), ("lru", [Unload(0), Load(2)], [])],
)
def test_belady_keeps_what_is_needed_next(policy, at_once, later):
    """The one slot is taken by kind 1; of kind 0, used longest ago, one waits, and more of a third."""
    schedule = ready({1: 1}, policy=policy)
    assert started(schedule, 1.0) == [(1, 0)]
    for request, kind in (("next", 2), ("after", 2), ("last", 0)):
        schedule.arrive(request, kind, 2.0)
    assert schedule.act(2.0) == at_once
    schedule.finished((1, 0))
    assert schedule.act(3.0) == later


LIMIT = 12.0


@given(st.floats(0, 50), st.integers(1, 2), st.floats(1.0, 1.5))
def test_none_waits_beyond_the_limit_beside_a_kind_that_always_has_requests(lonely, in_memory, pace):
    """One slot that kind 0 alone would fill, and one request of kind 1."""
    arrivals = [(pace * number, 0) for number in range(60)] + [(lonely, 1)]
    schedule = Schedule(2, in_memory, parallel=1, limit=LIMIT)
    waits = simulate(schedule, arrivals, in_memory, 1)
    assert max(waits) <= LIMIT


@given(st.lists(st.tuples(st.floats(4, 8), st.integers(0, KINDS - 1)), max_size=20))
def test_none_waits_beyond_the_limit_where_there_is_time_for_each(gaps):
    """There is time to load a model for each request by itself."""
    time, arrivals = 0.0, []
    for gap, kind in gaps:
        time += gap
        arrivals.append((time, kind))
    assert max(simulate(Schedule(KINDS, 2, 1, LIMIT), arrivals, 2, 1), default=0) <= LIMIT


@pytest.mark.parametrize("limit", [LIMIT, 2 * LIMIT])
@pytest.mark.parametrize("seed", range(5))
def test_none_waits_beyond_the_limit_that_many_come_near_to(seed, limit):
    """Nearly all wait half of the shorter one: answered by their age, a model would be loaded for each."""
    chooser, time, arrivals = random.Random(seed), 0.0, []
    for _ in range(64):
        time += chooser.expovariate(1 / 0.3)
        arrivals.append((time, chooser.randrange(KINDS)))
    assert max(simulate(Schedule(KINDS, 2, 4, limit), arrivals, 2, 4, run=0.7, load=2.8)) <= limit


def started(schedule: Schedule, now: float) -> list[int]:
    return [action.request for action in schedule.act(now) if isinstance(action, Start)]


def ready(queues: dict[int, int], in_memory: int = 2, parallel: int = 1, **more) -> Schedule:
    """A schedule with both first kinds in memory, and so many requests of each kind, named kind and number."""
    schedule = Schedule(KINDS, in_memory, parallel, **more)
    for kind in (0, 1):
        schedule.arrive("warm", kind, 0.0)
        assert Load(kind) in schedule.act(0.0)
        schedule.loaded(kind)
        schedule.act(0.0)
        schedule.finished("warm")
    for kind, number in queues.items():
        for each in range(number):
            schedule.arrive((kind, each), kind, 1.0)
    return schedule


def test_the_longest_queue_fills_the_slots():
    schedule = ready({0: 2, 1: 3}, parallel=4)
    assert started(schedule, 1.0) == [(1, 0), (0, 0), (1, 1), (0, 1)]


def test_what_waited_half_of_the_limit_goes_first_and_others_go_on_while_its_model_is_loaded():
    schedule = ready({0: 3}, limit=30.0)
    schedule.arrive("late", 2, 1.0)
    assert schedule.act(2.0) == [Start((0, 0))]
    schedule.finished((0, 0))
    for each in range(3):  # of other kinds, in longer queues
        schedule.arrive((1, each), 1, 15.5)
    schedule.arrive((0, 3), 0, 15.5)
    assert schedule.act(15.9) == [Start((0, 1))]
    schedule.finished((0, 1))
    schedule.finished((0, 2))  # its client has gone
    assert schedule.act(16.0) == [Start((1, 0)), Unload(0), Load(2)]  # of 0 fewer wait
    assert schedule.act(16.5) == []
    schedule.loaded(2)
    schedule.finished((1, 0))
    assert started(schedule, 17.0) == ["late"]


def test_the_next_model_is_loaded_while_the_one_before_answers():
    schedule = ready({0: 1})
    assert started(schedule, 1.0) == [(0, 0)]
    schedule.arrive("next", 2, 2.0)
    assert schedule.act(2.0) == [Unload(1), Load(2)]


def test_a_model_that_was_just_loaded_is_not_the_one_used_longest_ago():
    schedule = ready({0: 1}, policy="lru")
    assert started(schedule, 1.0) == [(0, 0)]
    schedule.arrive("next", 2, 2.0)
    assert schedule.act(2.0) == [Unload(1), Load(2)]
    schedule.loaded(2)  # and the slot is still taken
    for request in ("later", "last"):
        schedule.arrive(request, 3, 2.5)
    assert schedule.act(2.5) == []
    schedule.finished((0, 0))
    assert schedule.act(3.0) == [Unload(0), Start("next"), Load(3)]


def test_fifo_takes_them_as_they_came():
    schedule = ready({}, policy="fifo")
    for number, kind in enumerate((0, 1, 0)):
        schedule.arrive(number, kind, 1.0 + number)
    for number in range(3):
        assert started(schedule, 9.0) == [number]
        schedule.finished(number)


def test_a_client_that_goes_away_gives_its_place_up():
    schedule = ready({0: 3})
    schedule.finished((0, 0))
    assert started(schedule, 1.0) == [(0, 1)]
    assert schedule.queued == [1, 0, 0, 0]


def test_a_model_that_cannot_be_loaded_gives_its_requests_up():
    schedule = ready({0: 1, 3: 2})
    assert Load(3) in schedule.act(1.0)
    assert schedule.failed(3) == [(3, 0), (3, 1)]
    assert started(schedule, 2.0) in ([], [(0, 0)])
    assert schedule.queued[3] == 0
