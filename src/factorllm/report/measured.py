"""What other commands measured of a student, read from the files that they wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from factorllm.errors import FactorLLMError, refusing
from factorllm.measure.agreement import Agreement
from factorllm.measure.chain.run import ChainScore
from factorllm.measure.front.points import Front
from factorllm.measure.front.show import read_front
from factorllm.measure.tasks import TASKS, Score, kept_in_mean

_INSTEAD = "give the file that factorllm eval -o wrote with --scores, and speed.json of bench -o with --speed"


class Scores(BaseModel):
    """Of `factorllm eval -o`: by model and task; on a text, perplexity, and the student's agreement; a chain."""

    scores: dict[str, dict[str, Score]]
    perplexity: dict[str, float] = {}
    agreement: Agreement | None = None
    chain: ChainScore | None = None

    def kept(self) -> tuple[float, str] | None:
        """The share of the dense model that is kept, and of what: its scores, or its likeliest next tokens."""
        student, dense = self.scores.get("student"), self.scores.get("dense")
        if student and dense:
            kept = kept_in_mean(student, dense)
            if kept.plain is not None:
                return kept.plain, f"the scores of {', '.join(kept.tasks)}"
        return (self.agreement.top_1, "the likeliest next tokens") if self.agreement else None


class TimedModel(BaseModel):
    """One model of `factorllm bench -o`."""

    name: str
    ratio_to_dense: dict[str, list[float]]
    bytes: int | None = None
    cost: dict[str, float] = {}


class Speed(BaseModel):
    """Of `factorllm bench -o`."""

    models: list[TimedModel]

    def decoding(self) -> dict[str, float]:
        """Decode speed at batch 1 of each model, x dense."""
        return {model.name: speeds[0] for model in self.models if (speeds := model.ratio_to_dense.get("decode x1"))}

    def decoding_beside(self, results: dict[str, dict]) -> dict[str, float]:
        """The same of the models of a checkpoint's results.

        A healed student is the one that was timed, and ran the same products before healing. Of a prune with other
        active parameters than the one in the results it is not known how it would be.
        """
        speeds = self.decoding()
        if "student" in speeds:
            speeds["healed"] = speeds["student"]
        timed, wanted = self.of("pruned"), results.get("pruned", {}).get("active_parameters")
        if timed and timed.cost.get("active_parameters", wanted) != wanted:
            speeds.pop("pruned", None)
        return speeds

    def of(self, name: str) -> TimedModel | None:
        return next((model for model in self.models if model.name == name), None)


@dataclass(frozen=True)
class Measured:
    """All that was measured; None where a file was not given."""

    scores: Scores | None = None
    speed: Speed | None = None
    front: Front | None = None

    def numbers(self) -> list[tuple[str, str]]:
        """The three numbers that count, each with what it is: how fast, how much kept, how large."""
        timed = self.speed and self.speed.of("student")
        found = []
        if timed and (ratio := timed.ratio_to_dense.get("decode x1")):
            middle, low, high = ratio
            found.append((f"{middle:.2f} x", f"as fast as dense, decoding [{low:.2f}-{high:.2f}]"))
        if kept := self.scores and self.scores.kept():
            found.append((f"{kept[0]:.0%}", f"kept of {kept[1]}"))
        if timed and timed.bytes:
            dense = self.speed.of("dense") if self.speed else None
            beside = f", dense {dense.bytes / 2**20:.0f}" if dense and dense.bytes else ""
            found.append((f"{timed.bytes / 2**20:.0f} MiB", f"in the file{beside}"))
        return found


def read_measured(scores: Path | None, speed: Path | None, front: Path | None = None) -> Measured:
    """What was measured of a student.

    Args:
        scores: JSON that `factorllm eval -o` wrote.
        speed: `speed.json` of `factorllm bench -o`.
        front: `front.json` of `factorllm front -o`.

    Raises:
        FactorLLMError: for a file that is not what it is given as.
    """
    return Measured(
        None if scores is None else _scores(scores),
        None if speed is None else _speed(speed),
        None if front is None else read_front(front),
    )


def _scores(path: Path) -> Scores:
    found = _read(path, Scores)
    student = found.scores.get("student", {"": None})
    if not found.scores.get("dense", student).keys() >= student.keys() <= TASKS.keys():
        raise FactorLLMError(f"{path} has no scores of a student, and of its dense model on the same tasks; {_INSTEAD}")
    return found


def _speed(path: Path) -> Speed:
    found = _read(path, Speed)
    if not found.decoding():
        raise FactorLLMError(f"{path} has no decode speed at batch 1; run factorllm bench with --batch 1")
    return found


_File = TypeVar("_File", bound=BaseModel)


def _read(path: Path, kind: type[_File]) -> _File:
    with refusing(path, _INSTEAD):
        return kind.model_validate_json(path.read_bytes())
