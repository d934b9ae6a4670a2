"""`make()`: from a wish, or a plan that was written before, to a model that can be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from factorllm.errors import FactorLLMError
from factorllm.making.card import commands, numbers
from factorllm.making.check import check_plan
from factorllm.making.choose import Effort, choose_plan
from factorllm.making.expected import expected_seconds
from factorllm.making.plan_file import MakePlan, read_plan
from factorllm.making.steps import Progress, Work
from factorllm.planning.wish import Wish
from factorllm.runs.apart import apart
from factorllm.runs.course import Course
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.given import given, given_count, given_if_any, given_settings
from factorllm.runs.output import PLAN, located, read_json
from factorllm.runs.progress import minutes, show_course
from factorllm.runs.workspace import write_json


@dataclass(frozen=True)
class Made:
    """What `make` made.

    Attributes:
        numbers: how fast, how much is kept, how large, each with what it is.
        commands: how to use it.
    """

    out: Path
    plan: MakePlan
    numbers: list[tuple[str, str]]
    commands: list[str]


@apart()
def make(
    model: str | Path,
    out: str | Path,
    *,
    wish: Wish | None = None,
    text: str | Path | None = None,
    vocabulary: int | None = None,
    effort: Effort = "standard",
    file_type: str = "q8_0",
    console: Console | None = None,
) -> Made:
    """Sample text if there is none, factorize, heal, export, evaluate, time and report: all that a model takes.

    What is chosen is written to `OUT/plan.yaml` first. A killed run goes on when it is called again with the same
    arguments, and ends with the same bytes; a finished one is not repeated.

    Args:
        model: a hub id, a folder of safetensors, or a `.gguf` file.
        out: a folder of its own.
        wish: how fast, how good, in how much time and memory.
        text: as for `factorize`; None to sample from the model.
        vocabulary: tokens that stay, by the text, before anything else is done; None for all.
        effort: how much text and healing: `quick`, `standard` or `best`.
        file_type: of the GGUF file.
        console: where progress is shown.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.

    Example:
        >>> made = make("dense", "made", text="my-text.txt", effort="quick", file_type="q8_0")
        >>> (made.out / "Modelfile").exists()
        True
    """
    model, text = given(model), given_if_any(text)
    vocabulary = None if vocabulary is None else given_count("--vocabulary", vocabulary)
    out, console, wish = located(out), console or Console(quiet=True), given_settings(wish, Wish())
    asked: dict[str, Any] = {"model": model, "text": text, "vocabulary": vocabulary, "effort": effort}
    asked |= {"type": file_type, "wish": wish.model_dump(mode="json")}
    path, before = out / PLAN, read_json(out / "steps" / "asked.json")
    if path.is_file() and before != asked:
        written = "elsewhere, and not for this wish" if before is None else "for another wish"
        raise FactorLLMError(
            f"{path} was written {written}; edit it and run `factorllm make {quote(str(path))}`, or choose another -o"
        )
    if not path.is_file():
        _check_free(out)
        plan = choose_plan(model, wish, text, vocabulary, effort, file_type, console)
        with explain_full_disk(out):
            (out / "steps").mkdir(parents=True, exist_ok=True)
            write_json(out / "steps" / "asked.json", asked)
            plan.write(path)
        console.print(f"planned: {path}", soft_wrap=True, highlight=False, markup=False)
    return make_planned(path, console=console)


@apart()
def make_planned(path: str | Path, out: str | Path | None = None, console: Console | None = None) -> Made:
    """Make what a `plan.yaml` says.

    Args:
        path: of the plan, as `make` wrote it or edited.
        out: the folder to write to; by default the one that the plan is in.

    Raises:
        FactorLLMError: for a plan that cannot be read, and as `make`.

    Example:
        >>> from factorllm import MakePlan, Settings
        >>> few = Settings(tokens=4096, held_out_tokens=512, length=64)
        >>> plan = MakePlan(model="dense", recipe="S2A2E8", text="my-text.txt", factorize=few)
        >>> plan.write("plan.yaml")
        >>> [what for value, what in make_planned("plan.yaml", "made").numbers]
        ['kept of the likeliest next tokens', 'in the file']
    """
    path, console = located(path), console or Console(quiet=True)
    plan, out = read_plan(path), located(out) if out else path.parent
    if out != path.parent and not (out / PLAN).exists():
        _check_free(out)
        check_plan(plan)
        out.mkdir(parents=True, exist_ok=True)
        plan.write(out / PLAN)
    elif out != path.parent and read_plan(out / PLAN) != plan:
        raise FactorLLMError(f"{out / PLAN} is another plan; choose another -o")
    work = Work(plan, out, console)
    with explain_full_disk(out):
        work.at.steps.mkdir(parents=True, exist_ok=True)
        _run(work)
    return Made(out, plan, numbers(work.at), commands(work.at))


def _run(work: Work) -> None:
    steps, console = work.steps(), work.console
    progress = Progress(work, steps)
    missing = [step for step in steps if not progress.is_done(step)]
    if not missing:
        console.print("made already, by the same plan")
        return
    check_plan(work.plan)
    course = Course(expected_seconds(work.plan, [step.name for step in missing]))
    with show_course(console, "all steps", course):
        for step in missing:
            place = f"step {steps.index(step) + 1} of {len(steps)}: {step.name}"
            console.print(f"{place}; all is done in about {minutes(course.left())}", highlight=False)
            course.start(step.name)
            progress.begin(step)
            with _options_in_the_plan(step.name, work.at.out / PLAN):
                step.run()
            progress.mark(step)
            console.print(f"{place} took {minutes(course.end())}", highlight=False)


@contextmanager
def _options_in_the_plan(step: str, plan: Path) -> Iterator[None]:
    """A step advises as its own command does, by options that `make` has not."""
    try:
        yield
    except FactorLLMError as error:
        if " --" not in str(error):
            raise
        raise FactorLLMError(f"{step}: {error}; options of {step} stand in {plan}, to be changed there") from error


def _check_free(out: Path) -> None:
    """Refuse a folder that holds anything that `make` did not put there."""
    if out.exists() and (not out.is_dir() or any(path.name != "steps" for path in out.iterdir())):
        raise FactorLLMError(f"{out} exists and holds no {PLAN}; choose another -o, or move it away")
