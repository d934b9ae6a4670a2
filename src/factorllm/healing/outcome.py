"""What a training came to: the checkpoint that is kept, which may be the start, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerState

from factorllm.healing.coordinate import CHURN, KAPPA
from factorllm.healing.rate import Rate
from factorllm.healing.settings import HealSettings
from factorllm.healing.spikes import Spike
from factorllm.healing.trainer import SKIPPED

_WHY = {
    "given": "was given: use a smaller one, or leave --learning-rate out and one is found",
    "found": "was found on the student itself: use more --tokens, or a smaller --learning-rate",
    "usual": "is the usual one, for these tokens are too few to find one: use more --tokens, or a smaller "
    "--learning-rate",
}
"""Where the rate is from, and what to do when nothing was gained."""

_CURVE = ("loss", "kd", "pa", "balance", "label", "hidden", "eval_loss", KAPPA, CHURN)


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        rate: the learning rate, and where it is from.
        best_step: after which the validation loss was lowest; 0 is the start, whose weights are kept then.
        skipped_steps: steps that were left out because their gradient was not finite.
        spikes: jumps of the loss that were undone.
        curve: of each step that was logged, the losses.
        settings: of the healing.
    """

    rate: Rate
    best_step: int
    skipped_steps: int
    spikes: list[Spike]
    curve: list[dict[str, Any]]
    settings: HealSettings

    @property
    def gained(self) -> bool:
        """Whether a checkpoint is better than the start."""
        return self.best_step > 0

    @property
    def sentence(self) -> str:
        """For the user: what was gained, or why nothing was."""
        validation = {point["step"]: point["eval_loss"] for point in self.curve if "eval_loss" in point}
        start, file_type = validation[0], self.settings.quantize
        measured = self.settings.measured(f"of {file_type} weights " if file_type else "")
        skipped = f"; {self.skipped_steps} steps were left out, for their gradient was not finite"
        skipped = (skipped if self.skipped_steps else "") + "".join(map(_told, self.spikes))
        if self.gained:
            kept = f"{start:.4f} before, {validation[self.best_step]:.4f} after step {self.best_step}, which is kept"
            return f"{measured}: {kept}{skipped}"
        after = min((loss for step, loss in validation.items() if step), default=math.inf)
        return (
            f"nothing was gained, and the student is written as it was: its {measured} is {start:.4f}, and "
            f"at best {after:.4f} after steps at a learning rate of {self.rate.value:.2g}, which "
            f"{_WHY[self.rate.origin]}{skipped}"
        )

    def as_dict(self) -> dict[str, Any]:
        """As `factorllm.json` has it."""
        return {
            "learning_rate": self.rate.as_dict(),
            "best_step": self.best_step,
            "skipped_steps": self.skipped_steps,
            "spikes": [asdict(spike) for spike in self.spikes],
            "outcome": self.sentence,
            "curve": self.curve,
        }


def _told(spike: Spike) -> str:
    return (
        f"; the loss jumped in step {spike.step}, and training went back to step {spike.back_to} and left out the "
        f"batches of steps {spike.first} to {spike.last}"
    )


def read_outcome(state: TrainerState, rate: Rate, spikes: list[Spike], settings: HealSettings) -> Outcome:
    """What a finished training came to, from what the Trainer logged and the spikes that were undone."""
    history = state.log_history
    last = max(entry["step"] for entry in history if "eval_loss" in entry)
    points = [{"step": entry["step"]} | {key: entry[key] for key in _CURVE if key in entry} for entry in history]
    return Outcome(
        rate=rate,
        best_step=state.best_global_step or 0,
        skipped_steps=sum(SKIPPED in entry for entry in history),
        spikes=spikes,
        # A run that goes on where another one had stopped takes a step before it stops too.
        curve=[point for point in points if len(point) > 1 and point["step"] <= last],
        settings=settings,
    )
