"""`FactorTrainer`: a transformers `Trainer` whose loss is that of `losses`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import ModelOutput

from factorllm.convert.route import FLATTEN, pa_loss
from factorllm.healing.checkpoints import CheckpointWriter, has_room_for_copy
from factorllm.healing.losses import balance_loss, hidden_loss, kd_loss, label_loss, matched_streams
from factorllm.healing.memory import MicroBatch, is_out_of_memory
from factorllm.healing.rounding import Rounding
from factorllm.healing.settings import HealSettings
from factorllm.runs.progress import Meter
from factorllm.student.routers import Routers, is_router

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8

_HOPELESS = 1e6
"""Nats that a validation loss counts which is not finite: more than any that is."""

_UNSHARDED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Where one process has the whole state."""

SKIPPED = "skipped"
"""Key of a log entry: an optimizer step was left out."""


class FactorTrainer(Trainer):
    """Trains a student on the items of `targets.Targets`.

    Args:
        model: the student, with its parameters frozen as wanted (`students.set_learning`).
        settings: how to heal.
        routers: the student's; without routers the loss has no `L_PA` and no `L_balance`.
        micro_batch: how many sequences run at once.
        bfloat16: whether matrix products are computed in bfloat16.
        rounding: of the weights while the student runs.

    All else goes to `Trainer`.

    Attributes:
        left_out: steps, counted from 1, whose batches are not trained on.
        writer: of its checkpoints.
        starts_as_given: whether the start is measured with the student's own gates where soft ones are trained: what
            comes out must not be worse than what went in.
    """

    starts_as_given = True

    def __init__(
        self,
        model: nn.Module,
        settings: HealSettings,
        routers: Routers,
        micro_batch: MicroBatch,
        bfloat16: bool,
        rounding: Rounding,
        **options,
    ):
        super().__init__(model=model, **options)
        # The loss is a mean over tokens of sequences of one length, so accumulated parts count the same.
        self.model_accepts_loss_kwargs = False
        self.settings, self.routers, self._bfloat16, self._rounding = settings, routers, bfloat16, rounding
        self._weights = {
            "kd": 1.0,
            "pa": settings.pa_weight,
            "balance": settings.balance_weight,
            "label": settings.label_weight,
            "hidden": settings.hidden_weight,
        }
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self.micro_batch, self.left_out = micro_batch, set[int]()
        self.writer, self._in_thread = CheckpointWriter(), False
        self._step_inputs: list[dict[str, Tensor]] = []
        self._step_losses: list[Tensor] = []
        self._step_terms: dict[str, list[Tensor]] = defaultdict(list)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As `Trainer`'s; where memory ends, the step begins anew in smaller parts.

        It does nothing in a step of `left_out`: without a gradient weights and moments stay. `Trainer` leaves a loss
        that is not a number out of its mean.
        """
        if self.state.global_step + 1 in self.left_out:
            return torch.tensor(torch.nan, device=self.args.device)
        self._begin_rounding()
        self._step_inputs.append(inputs)
        pending = [inputs]
        while True:
            try:
                for each in pending:
                    self._step_losses.append(self._in_parts(model, each))
                return self._step_losses[-1]
            except Exception as error:
                smaller = is_out_of_memory(error) and self.micro_batch.halve()
                if not smaller or not self.begins_anew:
                    raise
            clear_device_cache(garbage_collection=True)
            model.zero_grad()
            self._begin_step()
            pending = self._step_inputs

    @property
    def begins_anew(self) -> bool:
        """Whether a backward pass that broke off can: others wait for theirs, and engines of other libraries count."""
        return self.accelerator.distributed_type == DistributedType.NO

    def _in_parts(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        parts, step = self.micro_batch.parts(inputs), super().training_step
        count = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = count * len(parts)
        try:
            return torch.stack([step(model, part) for part in parts]).sum()
        finally:
            self.current_gradient_accumulation_steps = count

    def _begin_step(self) -> None:
        self._step_losses.clear()
        self._step_terms.clear()

    def _end_step(self) -> None:
        """Note what the step came to."""
        losses = self._step_losses or [torch.tensor(torch.nan, device=self.args.device)]
        self._step_loss = torch.stack(losses).sum()
        for name, values in self._step_terms.items():
            self._terms[name].append(_finite_mean(torch.stack(values)))
        self._step_inputs.clear()
        self._begin_step()

    def step_loss(self) -> float:
        """Loss of the last step, over all processes; not a number if it was left out."""
        return self.accelerator.gather(self._step_loss.reshape(1)).mean().item()

    def compute_loss_context_manager(self) -> AbstractContextManager:
        """Autocast, where `Trainer` would leave it to accelerate: under FSDP and DeepSpeed that casts the weights
        themselves, and tokens would be routed in bfloat16."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bfloat16)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.routers.start()
        streams = self.settings.hidden_weight > 0
        output = model(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=streams)
        terms = self._losses(output, inputs)
        for name, value in terms.items():
            self._step_terms[name].append(value.detach())
        loss = _poisoned_unless_finite(sum(self._weights[name] * value for name, value in terms.items()))
        return (loss, output) if return_outputs else loss

    def _losses(self, output: ModelOutput, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        settings, routers, logits = self.settings, self.routers, output.logits
        terms = {"kd": kd_loss(logits, inputs["top_ids"], inputs["top_log_probs"], settings.temperature)}
        if settings.label_weight:
            terms["label"] = label_loss(logits, inputs["input_ids"])
        if settings.hidden_weight:
            streams = matched_streams(output.hidden_states, settings.hidden_layers)
            terms["hidden"] = hidden_loss(streams, inputs["streams"])
        if routers.modules:
            picked = routers.logits(settings.gates == "soft")
            prior = inputs["priors"].float()
            terms["pa"] = pa_loss(picked.flatten(0, 1), prior.flatten(0, 2))
            layerwise = picked.view(*prior.shape).transpose(1, 2).flatten(0, 1)
            terms["balance"] = balance_loss(layerwise, routers.top_k)
        return terms

    def _begin_rounding(self) -> None:
        if self._rounding:
            self.writer.wait_for_copy()  # of the exact weights
            self._rounding.begin()

    def evaluate(self, *args, **options) -> dict[str, float]:
        """The student is measured as the file that it will be, and the start as the one that it was."""
        starts = self.state.global_step == 0 and self.accelerator.distributed_type in _UNSHARDED
        self._begin_rounding()
        try:
            with self.routers.as_given() if starts and self.starts_as_given else nullcontext():
                return super().evaluate(*args, **options)
        finally:
            self._rounding.end()

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The validation loss is the KL divergence alone: it says what the student lost."""
        losses, temperature = [], self.settings.temperature
        for part in self.micro_batch.parts(self._prepare_inputs(inputs)):
            with self.compute_loss_context_manager():
                logits = model(input_ids=part["input_ids"], use_cache=False).logits
            losses.append(kd_loss(logits, part["top_ids"], part["top_log_probs"], temperature))
        loss = torch.stack(losses).mean() / temperature**2  # which is for gradients of one size
        return loss.nan_to_num(_HOPELESS, _HOPELESS), None, None  # `Trainer` would leave it out of the mean

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clips, and leaves out the step where the gradient is not finite: parameters without a gradient keep their
        weights and Adam's moments. The norm is that over all processes, so they agree."""
        self._end_step()
        self._rounding.end()
        self.writer.wait_for_copy()  # what follows changes the weights
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(norm):
            for parameter in model.parameters():
                parameter.grad = None
            self.log({SKIPPED: 1})
        return norm

    def create_optimizer(self, *_):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self._groups(), betas=_BETAS, eps=_EPSILON, weight_decay=0.0, fused=True)
        return self.optimizer

    @property
    def _scale(self) -> float:
        return 1.0 if self.settings.gates == "soft" else FLATTEN

    @property
    def router_rate(self) -> float:
        return self.args.learning_rate * self._scale * self.settings.router_rate

    def _groups(self) -> list[dict]:
        """Flattened routers are small by a known factor, and so must their steps be."""
        rate = self.args.learning_rate
        learning = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        routers = [p for name, p in learning if is_router(name)]
        others = [p for name, p in learning if not is_router(name)]
        groups = [
            {"params": routers, "lr": self.router_rate, "eps": _EPSILON * self._scale},
            {"params": others, "lr": rate},
        ]
        return [group for group in groups if group["params"]]

    def _save_checkpoint(self, model, trial):
        self.writer.finish()  # one at a time
        plain = self.accelerator.distributed_type in _UNSHARDED
        unwrapped = self.accelerator.unwrap_model(self.model)  # adapters are small, and have names of their own
        self._in_thread = plain and isinstance(unwrapped, PreTrainedModel) and has_room_for_copy(unwrapped)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_thread:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            self.writer.begin(Path(output_dir), self.accelerator.unwrap_model(self.model), self.optimizer.state_dict())

    def _load_best_model(self) -> None:
        self.writer.finish()
        self.accelerator.wait_for_everyone()  # one process writes, all read
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Checkpoints to resume from hold the names in memory: `Trainer` loads them without the renaming that
        `from_pretrained` does, and would silently leave the experts as they were."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # adapters have their own names
            super()._save(output_dir, state_dict)
        elif self._in_thread:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)

    def forget_terms(self) -> None:
        """Leave what was computed so far out of the next log."""
        self._begin_step()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term of the loss since the last log, over all processes."""
        if "loss" in logs and self._terms:
            for name, values in self._terms.items():
                mean = self.accelerator.gather(_finite_mean(torch.stack(values)).reshape(1)).nanmean().item()
                logs |= {name: mean} if math.isfinite(mean) else {}
            self._terms.clear()
        super().log(logs, start_time)


def _poisoned_unless_finite(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, the gradient is not either, in whatever process, and the step is left out."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _finite_mean(values: Tensor) -> Tensor:
    """Mean of those that are finite; not a number if none is."""
    return values[values.isfinite()].mean()


class BestCallback(TrainerCallback):
    """Keeps the best of the checkpoints, the start among them, and stops when there was no better one for long.

    All that it knows is in the Trainer's state, so a run that was killed and goes on decides as one that was not.

    Args:
        patience: evaluations without a better one after which training stops.
    """

    def __init__(self, patience: int):
        self._patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = self._is_over(state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = metrics["eval_loss"]
        if state.global_step == 0:
            state.best_metric, state.best_global_step = loss, 0
        elif loss >= state.best_metric and self._is_over(state):
            control.should_training_stop = True

    def _is_over(self, state: TrainerState) -> bool:
        best = state.best_global_step or 0
        return sum("eval_loss" in entry for entry in state.log_history if entry["step"] > best) >= self._patience


class ProgressCallback(TrainerCallback):
    """Tells how far training is.

    Args:
        bar: of its steps.
        say: called with a line for each evaluation.
        measured: what the validation loss is, in words.
    """

    def __init__(self, bar: Meter, say: Callable[[str], None], measured: str):
        self._bar, self._say, self._measured = bar, say, measured

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.advance()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._say(f"step {state.global_step}: {self._measured} {metrics['eval_loss']:.4f}")
        if state.global_step == 0:
            self._bar.begin()  # the start is measured once, and takes as long as many steps
