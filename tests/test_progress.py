"""Progress of work in several steps: how long all of them will take, and one display for them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from factorllm.runs import course as course_module
from factorllm.runs.course import Course
from factorllm.runs.progress import meter, show_course


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(course_module.time, "monotonic", lambda: now[0])
    return now


def test_what_is_left_follows_the_steps_that_ended(clock):
    course = Course({"a": 10.0, "b": 20.0, "c": 30.0})
    assert course.left() == 60
    course.start("a")
    clock[0] += 4
    assert course.left() == 56
    clock[0] += 16
    assert course.left() == 50  # it takes longer than was expected, by how much nobody knows yet
    assert course.end() == 20  # twice as long as expected, so the others will too
    assert course.left() == 100
    course.start("b")
    clock[0] += 10
    assert course.left() == 90
    assert course.share() == pytest.approx(0.25)


def test_only_what_has_ended_is_whole(clock):
    course = Course({"a": 1.0})
    course.start("a")
    clock[0] += 1000
    assert course.share() == 0.99
    course.end()
    assert (course.share(), course.left()) == (1, 0)


def test_the_bars_of_a_step_stand_below_that_of_all_steps():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, color_system=None)
    course = Course({"heal": 630.0})
    with show_course(console, "all steps", course):
        course.start("heal")
        with meter(console, "asking the teacher", 2) as bar:
            bar.advance()
        with meter(console, "healing", 2) as bar:
            bar.advance()
            console.print("said within")
    last = shown.getvalue().split("said within")[1]
    assert last.index("all steps") < last.index("healing")
    assert "asking" not in last
    assert "left 10:" in last


def test_without_a_terminal_there_are_lines_only():
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    with show_course(console, "all steps", Course({"heal": 60.0})), meter(console, "healing", 2) as bar:
        bar.advance()
    assert "━" not in shown.getvalue()


def test_time_before_the_first_step_is_no_part_of_what_a_step_takes(clock):
    shown = io.StringIO()
    with meter(Console(file=shown, width=100), "healing", 10) as bar:
        clock[0] += 600  # the start is measured
        bar.begin()
        clock[0] += 30
        bar.advance()
    assert shown.getvalue() == "healing: 10%, about 4:30 left\n"
