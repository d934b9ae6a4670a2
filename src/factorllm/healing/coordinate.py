"""The learning rate of routers beside that of all else, coordinated while they train (after CoMMIT, arXiv 2407.20454).

Now and then it is measured how far the routers' part of a step moved the next-token distributions, `D_R`, and how far
the rest of it did, `D_X`. Their ratio, smoothed, is the balance coefficient kappa. Routers that move too far take their
experts' work away, and routers that do not move learn nothing; so their rate is brought to where kappa is `BALANCE`.
That the two are balanced by the divergences of one step's parts is CoMMIT's; the rule for the rate is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import DistributedType
from rich.console import Console
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from factorllm.healing.losses import kd_loss, top_log_probs
from factorllm.student.routers import is_router

EVERY = 20
EARLY = (2, 4, 8, 16)
"""The step after which it is measured, besides each `EVERY`-th: a rate far off does its harm in the first ones."""

BALANCE = 0.02
"""What kappa is brought to."""

RANGE = 100.0
"""Times the rate of the start, up and down, that the routers' may become."""

_UP, _DOWN = 1.25, 0.1
"""What the rate is multiplied with at most and at least. A rate too high costs far more than one too low, and where it
moves hardly any pick, the few that are seen say little."""

KAPPA, CHURN = "kappa", "churn"
"""Keys of a log entry: the balance coefficient, and the share of the routers' picks that the step changed."""

_ROUTER, _REST = "router_shift", "rest_shift"  # smoothed: D_R at the rate of the start, and D_X
_KEPT = 0.9  # of what was measured before
_TOKENS = 512
_LEAST = 1e-6  # of kappa: rounding makes a divergence of nothing a little negative


def coordinate(trainer: Trainer, console: Console) -> None:
    """Let a `FactorTrainer` coordinate the rate of its routers; says where it cannot."""
    if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        # Weights are spread, and a forward pass just before a step leaves gathered ones that the step does not reach.
        console.print("the routers' learning rate stays as it is: it is not coordinated under FSDP and DeepSpeed")
        return
    trainer.add_callback(CoordinateCallback(trainer))


class CoordinateCallback(TrainerCallback):
    """Measures the balance coefficient, logs it, and adapts the routers' rate.

    What it knows is in the Trainer's log, and the rates are in the optimizer and the scheduler, so a run that was
    killed and goes on decides as one that was not.

    Args:
        trainer: a `FactorTrainer` whose routers learn. The first tokens of its validation text are measured on.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._before: _Before | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        if step % EVERY == 0 or step in EARLY:
            self._before = _Before(_weights(model), *self._said(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        before, self._before = self._before, None
        if before is None:
            return
        router, rest, churn = self._moved(before, model)
        if not rest > 0:  # the step was left out
            return
        past = next((entry for entry in reversed(state.log_history) if KAPPA in entry), {})
        times = self._rate / self._trainer.router_rate
        # A step moves picks in proportion to the rate, so what was measured at another rate still counts.
        router = _smoothed(past.get(_ROUTER), router / times)
        rest = _smoothed(past.get(_REST), rest)
        kappa = max(times * router / rest, _LEAST)
        due = control.should_log
        self._trainer.log({KAPPA: kappa, CHURN: churn, _ROUTER: router, _REST: rest})
        control.should_log = due  # else the losses of this step would be told with those of the next
        self._adapt(min(max((BALANCE / kappa) ** 0.5, _DOWN), _UP))

    @torch.no_grad()
    def _moved(self, before: _Before, model: nn.Module) -> list[float]:
        """`D_R`, `D_X` and the churn of the step. The rest of the step comes first, then the routers' part."""
        after = _weights(model)
        _put(model, before.routers)
        between, _ = self._said(model)
        _put(model, after)
        now, picks = self._said(model)
        router = kd_loss(now, *self._likely(between))
        rest = kd_loss(between, *self._likely(before.logits))
        churn = (picks & ~before.picks).sum() / picks.sum()
        return self._trainer.accelerator.reduce(torch.stack([router, rest, churn]), "mean").tolist()

    @torch.no_grad()
    def _said(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits of the tokens (sequences, length, vocabulary), and the experts picked for them."""
        trainer, tokens = self._trainer, self._trainer.eval_dataset.tokens
        rows = tokens[: max(_TOKENS // tokens.shape[1], 1), :_TOKENS].to(trainer.args.device)
        trainer.routers.start()
        with trainer.compute_loss_context_manager():
            logits = model(input_ids=rows, use_cache=False).logits
        return logits, trainer.routers.picks()

    def _likely(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return top_log_probs(logits, self._trainer.settings.vocabulary, 1.0)

    @property
    def _rate(self) -> float:
        """The routers' peak rate, as it is now; they are the optimizer's first group."""
        return self._trainer.lr_scheduler.base_lrs[0]

    def _adapt(self, factor: float) -> None:
        scheduler, start, before = self._trainer.lr_scheduler, self._trainer.router_rate, self._rate
        after = min(max(before * factor, start / RANGE), start * RANGE)
        group = scheduler.optimizer.param_groups[0]
        scheduler.base_lrs[0] = group["initial_lr"] = after
        group["lr"] *= after / before


@dataclass(frozen=True)
class _Before:
    """Before a step: the routers' weights, the model's logits, and the experts picked."""

    routers: list[Tensor]
    logits: Tensor
    picks: Tensor


def _smoothed(past: float | None, now: float) -> float:
    return now if past is None else _KEPT * past + (1 - _KEPT) * now


def _routers(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if is_router(name)]


def _weights(model: nn.Module) -> list[Tensor]:
    return [router.detach().clone() for router in _routers(model)]


def _put(model: nn.Module, weights: list[Tensor]) -> None:
    for router, weight in zip(_routers(model), weights, strict=True):
        router.copy_(weight)
