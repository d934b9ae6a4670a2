"""Where everything is in the folder that `make` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from factorllm.making.plan_file import MakePlan
from factorllm.measure.front.run import NUMBERS
from factorllm.report.measured import Measured, read_measured
from factorllm.runs.output import MADE


@dataclass(frozen=True)
class Place:
    """Where everything is in the folder that `make` writes by a plan."""

    out: Path
    plan: MakePlan

    @property
    def steps(self) -> Path:
        return self.out / "steps"

    @property
    def sampled(self) -> Path:
        return self.steps / "text.jsonl"

    @property
    def trimmed(self) -> Path:
        return self.out / "trimmed"

    @property
    def converted(self) -> Path:
        return self.steps / "converted"

    @property
    def checkpoint(self) -> Path:
        return self.out / MADE

    @property
    def gguf(self) -> Path:
        return self.out / f"{self.out.name}-{self.plan.export.type}.gguf"

    @property
    def scores(self) -> Path:
        return self.out / "scores.json"

    @property
    def speed(self) -> Path:
        return self.out / "speed"

    @property
    def timed(self) -> Path:
        return self.speed / "speed.json"

    @property
    def front(self) -> Path:
        return self.out / "front"

    @property
    def dense(self) -> str:
        """The dense model that has the student's vocabulary: what it is made from, taught by, and compared with."""
        return str(self.trimmed) if self.plan.vocabulary else self.plan.model

    def measured(self) -> Measured:
        """What the steps of the plan measured."""
        timed, front = self.timed if self.plan.bench else None, self.front / NUMBERS if self.plan.front else None
        return read_measured(self.scores, timed, front)
