"""Loss spikes: found by a running median, undone by a checkpoint of before, and not met again (after the Acme study,
arXiv 2403.07648, and PaLM, arXiv 2204.02311, section 5.1).

A loss is far off if it is not finite, or above the median of the last ones by six times their median absolute
deviation. Three in a row are a spike: training goes back to the last checkpoint of before it that was healthy, and
leaves out the batches of the spike. If they were not the cause, it comes again: from the second one on all batches
since the checkpoint are left out, and the learning rate is halved.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from factorllm.healing.checkpoints import checkpoints, read_state
from factorllm.runs.workspace import write_json

_WINDOW = 64  # losses that the median is of
_FEWEST = 16  # with fewer, no finite loss is far off
_DEVIATIONS = 6
_IN_A_ROW = 3
_LEAST = 0.01  # of the median, that a deviation counts at least: batches may be all alike
_MOST = 4  # spikes that are undone; after them the best checkpoint is what is kept, as without any
_HARMED = 1.25  # times the lowest validation loss of before, above which a checkpoint is not healthy


class SpikedError(Exception):
    """The loss has jumped; training is to go back.

    Args:
        first, last: steps in which it was far off, counted from 1.
    """

    def __init__(self, first: int, last: int):
        super().__init__(f"the loss jumped in steps {first} to {last}")
        self.first, self.last = first, last


@dataclass(frozen=True)
class Spike:
    """A spike that was undone.

    Attributes:
        step: in which it began, counted from 1.
        back_to: step of the checkpoint that training went back to; 0 is the start.
        first, last: steps whose batches are left out.
    """

    step: int
    back_to: int
    first: int
    last: int


class Spikes:
    """The spikes of a run, kept in a file, for a killed run must leave out the same batches.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self.found = [Spike(**each) for each in json.loads(path.read_text())] if path.exists() else []

    @property
    def left_out(self) -> set[int]:
        """Steps whose batches are left out, counted from 1."""
        return {step for spike in self.found for step in range(spike.first, spike.last + 1)}

    @property
    def halvings(self) -> int:
        """Times that the learning rate was halved."""
        return max(len(self.found) - 1, 0)

    def undo(self, spiked: SpikedError, folder: Path) -> Spike:
        """Remove the checkpoints that saw the spike, and note what to leave out.

        In this order: a run that is killed between the two meets the same spike again.

        Args:
            folder: of the checkpoints.
        """
        healthy = max((step for step in _healthy(folder) if step < spiked.first), default=0)
        first = healthy + 1 if self.found else spiked.first
        for step, path in checkpoints(folder).items():
            if step > healthy:
                shutil.rmtree(path)
        self.found.append(Spike(spiked.first, healthy, first, spiked.last))
        write_json(self._path, [asdict(spike) for spike in self.found])
        return self.found[-1]


def _healthy(folder: Path) -> list[int]:
    """Steps of the whole checkpoints whose validation loss is about the lowest of before, or lower."""
    states = {step: read_state(path) for step, path in checkpoints(folder).items()}
    return [step for step, state in states.items() if state and _is_healthy(state)]


def _is_healthy(state: dict) -> bool:
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    return losses[-1] <= _HARMED * min(losses)


class SpikeGuard(TrainerCallback, ExportableState):
    """Raises `SpikedError` where the loss has jumped. What it has seen is in each checkpoint.

    Args:
        spikes: of this run.
        take_loss: gives the loss of the step that has just ended, the same in all processes.
    """

    def __init__(self, spikes: Spikes, take_loss: Callable[[], float]):
        self._spikes, self._take_loss = spikes, take_loss
        self._losses: list[float] = []
        self._far: list[int] = []
        self._halvings = 0

    def state(self) -> dict:
        return {"losses": self._losses, "far": self._far, "halvings": self._halvings}

    def on_train_begin(self, args, state: TrainerState, control, optimizer=None, lr_scheduler=None, **kwargs):
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._losses, self._far, halved = list(kept["losses"]), list(kept["far"]), kept["halvings"]
        self._halvings = self._spikes.halvings
        _scale_rates(0.5 ** (self._halvings - halved), optimizer, lr_scheduler)

    def on_step_end(self, args, state: TrainerState, control, **kwargs):
        loss = self._take_loss()
        if state.global_step in self._spikes.left_out:
            return
        if not self._is_far_off(loss):
            self._losses, self._far = [*self._losses, loss][-_WINDOW:], []
            return
        self._far.append(state.global_step)
        if len(self._far) == _IN_A_ROW and len(self._spikes.found) < _MOST:
            raise SpikedError(self._far[0], self._far[-1])

    def _is_far_off(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < _FEWEST:
            return False
        middle = median(self._losses)
        deviation = median(abs(each - middle) for each in self._losses)
        return loss > middle + _DEVIATIONS * max(deviation, _LEAST * abs(middle))


def _scale_rates(factor: float, optimizer, scheduler) -> None:
    """Rates of now, and those that the schedule is a share of."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        group["lr"] *= factor
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    inner.base_lrs = [rate * factor for rate in inner.base_lrs]
