"""The learning rate, found on the student itself before its training (after L. Smith's range test, arXiv 1506.01186).

A few steps of the same optimizer on the same batches, each at a higher rate than the one before, and after each the KL
divergence to the teacher on a few validation tokens, always the same. It falls as long as steps help and rises when
they harm. The student is then loaded anew, so that training is the same as with that rate given.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from accelerate import DistributedType, PartialState
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import TrainerCallback

from factorllm.dense.names import LAYERS
from factorllm.dense.safetensors import TensorFolder, open_folder
from factorllm.healing.job import HealJob
from factorllm.healing.settings import usual_rate
from factorllm.healing.targets import Targets
from factorllm.healing.trainer import FactorTrainer
from factorllm.healing.training import common_arguments, new_trainer
from factorllm.runs.output import read_json
from factorllm.runs.progress import meter
from factorllm.runs.workspace import write_json

LOWEST = 2e-5
"""Rate of the first step, x the size of the student's weights."""
GROWTH = 1.6
"""How many times that of the one before is the rate of each next step."""
STEPS = 12
"""So the last one's rate is 3.5e-3 of that size."""

_TOKENS = 1024  # of validation text
_SHARE = 0.1  # of the run's work that finding the rate may take
_HARM = 1.25  # times the divergence of the start, at which the search ends: higher rates would harm more

FRACTION = 0.25
"""Of the rate after which the KL divergence was lowest. The search does not see what the noise of steps adds up to:
half gains more in 16 steps, but near that a student at 25 % FFN sparsity gained next to nothing in 60
(docs/healing.md)."""

_ADAPTED = 30
"""How many times as large rates are for a matrix's adapters as for the matrix: a step of B is multiplied by A's entries
of some hundredths. For a model of 1 M parameters it gives a fifth of the best rate (docs/experiments/2026-11.md)."""

_TEACHER, _TRAINING, _VALIDATING = 1, 3, 1  # work for a token, in passes forward

_FILE = "rate.json"


@dataclass(frozen=True)
class Rate:
    """A learning rate, and where it is from.

    Attributes:
        value: the peak of the training's.
        origin: `given`, `found`, or `usual`: that of students of this sparsity, where finding one would cost too much.
        start: KL divergence to the teacher before the first step, on the tokens of the search.
        tried: rate of each step of the search, and the KL divergence after it.
    """

    value: float
    origin: str
    start: float | None = None
    tried: list[tuple[float, float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def settle_rate(job: HealJob, targets: dict[str, Targets]) -> Rate:
    """The rate that was given, or one that is found, or the usual one. A resumed run takes the one that it had."""
    given = job.settings.learning_rate
    if given is not None:
        return Rate(given, "given")
    path = job.work.folder / _FILE
    known = read_json(path)
    job.ranks.wait()  # all must have looked before one writes
    rate = Rate(**known) if known else _find(job, targets)
    if not known and job.ranks.is_main:
        write_json(path, rate.as_dict())
    return rate


def _find(job: HealJob, targets: dict[str, Targets]) -> Rate:
    """A rate that is found where that is worth its work, else the usual one; says which, and why."""
    weight = typical_weight(open_folder(job.student, str(job.student))[2])
    if job.settings.has_adapters:
        weight *= _ADAPTED
    usual = usual_rate(job.shape, weight)
    validation = targets["validation"]
    length = validation.tokens.shape[1]
    few = Subset(validation, range(min(len(validation), math.ceil(_TOKENS / length))))
    share = _share(job, len(few) * length)
    if share > _SHARE:
        job.console.print(f"learning rate {usual:.2g}, as usual: to find one would be {share:.0%} of the whole work")
        return Rate(usual, "usual")
    if PartialState().distributed_type == DistributedType.DEEPSPEED:  # two engines in one process were never tried
        job.console.print(f"learning rate {usual:.2g}, as usual: none is searched for under DeepSpeed")
        return Rate(usual, "usual")
    start, tried = _sweep(job, targets["train"], few, LOWEST * weight)
    gc.collect()  # a Trainer refers to itself; its model and moments should be gone before those of the training come
    rate = Rate(choose(start, tried), "found", start, tried)
    job.console.print(f"learning rate {rate.value:.2g}, found on the student itself in {share:.0%} of the whole work")
    return rate


def _share(job: HealJob, validating: int) -> float:
    """Of the work of the whole run, that of the search.

    Args:
        validating: tokens of the search's validation.
    """
    settings, train, validation = job.settings, job.text["train"], job.text["validation"]
    step = _TRAINING * settings.batch * train.shape[1] + _VALIDATING * validating
    search = STEPS * step + _VALIDATING * validating
    training = (_TEACHER + _TRAINING * settings.epochs) * train.numel()
    validations = _VALIDATING * (settings.evaluations + 1) * validation.numel()
    return search / (training + validations)


def typical_weight(student: TensorFolder) -> float:
    """Root mean square of the matrices in a student's layers, of the median one."""
    inside = (name for name in student.names() if name.startswith(LAYERS) and len(student.shape(name)) > 1)
    return median(student.read(name).float().square().mean().sqrt().item() for name in inside)


def _sweep(job: HealJob, train: Targets, few: Subset, lowest: float) -> tuple[float, list[tuple[float, float]]]:
    """KL divergence before the first step; rate of each step, and the divergence after it."""
    arguments = common_arguments(
        job, lowest, STEPS, "rate", eval_on_start=True, eval_steps=1, save_strategy="no", logging_strategy="no",
        report_to=[],
    )  # fmt: skip
    trainer = new_trainer(job, arguments, train, few, _Sweep)
    with meter(job.console, "finding the learning rate", STEPS) as bar:
        trainer.add_callback(_SweepCallback(bar.advance))
        trainer.train()
    start, *after = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return start, [(lowest * GROWTH**step, loss) for step, loss in enumerate(after)]


class _Sweep(FactorTrainer):
    """Each step's rate is `GROWTH` times that of the one before. What it did is told by a start with the same gates."""

    starts_as_given = False

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: GROWTH**step)
        return self.lr_scheduler


class _SweepCallback(TrainerCallback):
    """Counts the steps, and ends the search where one has done harm.

    Args:
        advance: called after each step.
    """

    def __init__(self, advance: Callable[[], None]):
        self._advance, self._start = advance, math.inf

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0:
            self._start = metrics["eval_loss"]
            return
        self._advance()
        if metrics["eval_loss"] > _HARM * self._start:
            control.should_training_stop = True


def choose(start: float, tried: list[tuple[float, float]]) -> float:
    """A safe part of the rate after whose step the divergence was lowest; the lowest rate where none brought it down.

    Args:
        start: KL divergence before the first step.
        tried: rate of each step, and the divergence after it.
    """
    best, lowest = min(tried, key=lambda each: each[1])
    return FRACTION * best if lowest < start else tried[0][0]
