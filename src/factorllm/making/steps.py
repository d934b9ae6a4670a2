"""The steps of a plan, each of which goes on where it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from factorllm.convert.factorize import factorize
from factorllm.exporting import export_gguf
from factorllm.healing.run import heal
from factorllm.making.card import write_card
from factorllm.making.modelfile import write_modelfile
from factorllm.making.plan_file import MakePlan
from factorllm.measure.front.run import NUMBERS, run_front
from factorllm.measure.scores import evaluate
from factorllm.measure.speed.run import run_bench
from factorllm.report.findings import gather
from factorllm.report.measured import Measured, read_measured
from factorllm.report.page import check_report_folder, write_report
from factorllm.runs.digest import digest_of
from factorllm.runs.identity import versions
from factorllm.runs.output import read_json
from factorllm.runs.workspace import write_json
from factorllm.text.calibration import file_digest
from factorllm.text.sample import sample


@dataclass(frozen=True)
class Place:
    """Where everything is in the folder that `make` writes."""

    out: Path
    file_type: str

    @property
    def steps(self) -> Path:
        return self.out / "steps"

    @property
    def sampled(self) -> Path:
        return self.steps / "text.jsonl"

    @property
    def converted(self) -> Path:
        return self.steps / "converted"

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def gguf(self) -> Path:
        return self.out / f"{self.out.name}-{self.file_type}.gguf"

    @property
    def scores(self) -> Path:
        return self.out / "scores.json"

    @property
    def speed(self) -> Path:
        return self.out / "speed"

    @property
    def front(self) -> Path:
        return self.out / "front"

    def measured(self, plan: MakePlan) -> Measured:
        """What the steps of a plan measured."""
        speed = self.speed / "speed.json" if plan.bench else None
        return read_measured(self.scores, speed, self.front / NUMBERS if plan.front else None)


@dataclass(frozen=True)
class Step:
    """A part of the work.

    Attributes:
        key: what decides its result, beside the steps before.
        run: does it; called again after it was killed, it goes on.
    """

    name: str
    key: dict[str, Any]
    run: Callable[[], object]


def steps_of(plan: MakePlan, out: Path, console: Console) -> list[Step]:
    """All steps of a plan, in their order."""
    at = Place(out, plan.export.type)
    text = plan.text or str(at.sampled)
    converted = at.converted if plan.heal else at.checkpoint
    again: dict[str, Any] = {"overwrite": True, "console": console}
    said = plan.model_dump(mode="json")

    def export() -> object:
        weighed = {"text": text, "gptq": plan.export.gptq} if plan.export.weighed or plan.export.gptq else {}
        return export_gguf(str(at.checkpoint), at.gguf, plan.export.type, say=console.print, **weighed, **again)

    def measure() -> None:
        found = evaluate(at.checkpoint, against=plan.model, text=text, settings=plan.evaluate, console=console)
        write_json(at.scores, asdict(found))

    def report() -> None:
        check_report_folder(at.out / "report")
        found = gather(at.checkpoint, plan.model, at.measured(plan), plan.evaluate.device, console)
        write_report(at.out.name, found, at.out / "report")

    steps = []
    if plan.text is None and plan.sample:
        how = plan.sample
        settings = plan.factorize.model_copy(update={"tokens": how.tokens})
        told = {"chat": how.chat, "temperature": how.temperature, "settings": settings}
        steps.append(Step("sample", said["sample"], lambda: sample(plan.model, at.sampled, **told, **again)))
    fit = {"text": text, "settings": plan.factorize}
    steps.append(
        Step(
            "factorize",
            {"recipe": plan.recipe, "settings": said["factorize"], "text": plan.text and file_digest(plan.text)},
            lambda: factorize(plan.model, converted, plan.recipe, **fit, **again),
        )
    )
    if plan.heal:
        fine = {"text": text, "settings": plan.heal}
        steps.append(Step("heal", said["heal"], lambda: heal(converted, plan.model, at.checkpoint, **fine, **again)))
    steps += [Step("export", said["export"], export), Step("eval", said["evaluate"], measure)]
    if plan.bench:
        timed = (plan.engine, plan.export.type, plan.bench, at.speed, console)
        steps.append(Step("bench", said["bench"], lambda: run_bench(str(at.checkpoint), [plan.model], *timed)))
    if plan.front:
        front = (text, at.front, plan.front)
        measured = [str(at.checkpoint)], [plan.model]
        steps.append(Step("front", said["front"], lambda: run_front(*measured, *front, console=console)))
    steps.append(Step("report", {}, report))
    steps.append(Step("card", {}, lambda: (write_modelfile(at.gguf, at.out), write_card(plan, at))))
    return steps


class Progress:
    """Which steps are done, kept on disk. A step whose plan changed, or one before it, is to be done again."""

    def __init__(self, plan: MakePlan, out: Path, steps: list[Step]):
        self._path = Place(out, plan.export.type).steps / "done.json"
        self._done: dict[str, str] = read_json(self._path) or {}
        self._keys, so_far = {}, json.dumps({"model": plan.model, "versions": versions()})
        for step in steps:
            so_far = digest_of((), json.dumps([so_far, step.name, step.key], sort_keys=True).encode())
            self._keys[step.name] = so_far

    def is_done(self, step: Step) -> bool:
        return self._done.get(step.name) == self._keys[step.name]

    def mark(self, step: Step) -> None:
        self._done[step.name] = self._keys[step.name]
        write_json(self._path, self._done)
