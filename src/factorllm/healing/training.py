"""A student's training: its Trainer, how it is told to train, and where a killed run goes on."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import find_executable_batch_size
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available

from factorllm.healing.all_experts import learn_from_all_experts
from factorllm.healing.checkpoints import checkpoints, read_state
from factorllm.healing.coordinate import coordinate
from factorllm.healing.experts import use_autocast
from factorllm.healing.hang import HangWatch, is_supervised
from factorllm.healing.job import HealJob
from factorllm.healing.memory import MicroBatch
from factorllm.healing.mor1e import with_routing
from factorllm.healing.rounding import Rounding
from factorllm.healing.spikes import Spike, SpikedError, SpikeGuard, Spikes
from factorllm.healing.students import drop_nothing, set_learning
from factorllm.healing.targets import Targets
from factorllm.healing.trainer import BestCallback, FactorTrainer, ProgressCallback
from factorllm.runs.progress import meter, minutes
from factorllm.student.routers import Routers

_LOGS = 50
"""Points of the loss curve."""


def train(job: HealJob, targets: dict[str, Targets], rate: float) -> tuple[FactorTrainer, Spikes]:
    """Train the student, or go on where a killed run was. Where the loss jumps, training goes back as if killed, and
    leaves out the batches of the jump.

    Returns:
        The trainer, with the weights of the best checkpoint; if that is the start, with those of the last step; and
        the spikes that were undone.
    """
    while True:
        spikes = Spikes(job.work.folder / "spikes.json")
        job.ranks.wait()  # all must have looked before one writes
        try:
            return _train(job, targets, rate, spikes), spikes
        except SpikedError as spiked:
            job.ranks.wait()
            if job.ranks.is_main:
                spike = spikes.undo(spiked, job.work.folder / "trainer")
                job.console.print(f"{spiked}: going back to step {spike.back_to}{_consequence(spike, spikes)}")
            job.ranks.wait()
        gc.collect()  # the Trainer refers to itself; its model and moments should be gone before the next ones come


def _consequence(spike: Spike, spikes: Spikes) -> str:
    halved = f", at 1/{2**spikes.halvings} of the learning rate" if spikes.halvings else ""
    return f", and leaving out the batches of steps {spike.first} to {spike.last}{halved}"


def _train(job: HealJob, targets: dict[str, Targets], rate: float, spikes: Spikes) -> FactorTrainer:
    steps = steps_of(job)
    done, resume = _last_checkpoint(job.work.folder / "trainer")
    trainer = new_trainer(job, _arguments(job, rate, steps, done), targets["train"], targets["validation"])
    trainer.add_callback(BestCallback(job.settings.patience))
    if PartialState().distributed_type != DistributedType.DEEPSPEED:  # a second engine in one process was never tried
        trainer.left_out = spikes.left_out
        trainer.add_callback(SpikeGuard(spikes, trainer.step_loss))
    if job.settings.coordinate:
        coordinate(trainer, job.console)
    _predict(job, trainer, targets["train"], steps - done)
    with meter(job.console, "healing", steps, done) as bar:
        trainer.add_callback(ProgressCallback(bar, job.console.print, job.settings.measured()))
        with _watched(job, trainer):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@contextlib.contextmanager
def _watched(job: HealJob, trainer: FactorTrainer) -> Iterator[None]:
    """The last checkpoint is whole when the block ends; under an agent, a hang in it ends the process."""
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.writer.finish)
        if is_supervised():
            watch = HangWatch(job.work.folder / f"hang-{job.ranks.index}.log")
            trainer.add_callback(watch)
            stack.callback(watch.end)
        yield


def steps_of(job: HealJob) -> int:
    """Optimizer steps of the whole training."""
    return job.settings.epochs * (len(job.text["train"]) // job.settings.batch)


def new_trainer(
    job: HealJob,
    arguments: TrainingArguments,
    train: Dataset,
    validation: Dataset,
    kind: type[FactorTrainer] = FactorTrainer,
) -> FactorTrainer:
    """A trainer of the student as it was given, on data like the items of `Targets`."""
    settings = job.settings
    torch.manual_seed(job.made_with.seed)
    model = job.load(job.student)
    drop_nothing(model)
    routers, rounding = Routers(model), Rounding.of(model, job.student, settings.quantize)
    if routers.modules:
        use_autocast(model, job.device)
    if settings.gates == "soft" and not job.soft_gates:
        routers.unflatten()
    elif settings.gates == "all-experts":
        learn_from_all_experts(model, routers)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mor1e = settings.train == "mor1e"
    learner = with_routing(model, settings.kind_rank, job.mixture()) if mor1e else set_learning(model, settings)
    trainer = kind(
        learner, settings, routers, micro_batch_of(job), job.bfloat16, rounding, args=arguments, train_dataset=train,
        eval_dataset=validation,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # progress is told by ours
    return trainer


def micro_batch_of(job: HealJob) -> MicroBatch:
    """Of the run, as it is by now."""
    return MicroBatch(job.work.folder / "micro_batch.json", job.settings.micro_batch, job.console.print)


def common_arguments(job: HealJob, rate: float, steps: int, folder: str, **more) -> TrainingArguments:
    """What the training has in common with the search for its rate.

    Args:
        folder: name in the workspace.
    """
    settings = job.settings
    arguments = TrainingArguments(
        output_dir=str(job.work.folder / folder),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // (settings.micro_batch * job.ranks.count),
        learning_rate=rate,
        max_grad_norm=1.0,
        eval_strategy="steps",
        use_cpu=job.device.type == "cpu",
        seed=job.made_with.seed,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        **more,
    )
    arguments.mixed_precision = "no"  # whatever the launcher says: `--precision` decides, and the trainer does it
    return arguments


def _arguments(job: HealJob, rate: float, steps: int, done: int) -> TrainingArguments:
    every = math.ceil(steps / job.settings.evaluations)
    return common_arguments(
        job,
        rate,
        steps,
        "trainer",
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 20),
        logging_steps=max(steps // _LOGS, 1),
        eval_on_start=done == 0,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
    )


def _last_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """The newest checkpoint that is whole, after its step; step 0 where there is none."""
    return next((found for found in reversed(checkpoints(folder).items()) if read_state(found[1])), (0, None))


def _predict(job: HealJob, trainer: FactorTrainer, train: Targets, steps: int) -> None:
    """Time one part of a batch and say how long training will take."""
    if job.ranks.count > 1 or steps <= 0:
        return  # the model is not wrapped yet, so a step here would not be a step there
    model, micro_batch = trainer.model, trainer.micro_batch

    def measure(sequences: int) -> float:
        """Tokens a second."""
        batch = trainer.data_collator([train[i] for i in range(sequences)])
        inputs = {name: tensor.to(job.device) for name, tensor in batch.items()}
        for _ in range(2):  # the first one also warms up
            start = time.monotonic()
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(model, inputs).backward()
            if job.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
        return inputs["input_ids"].numel() / seconds

    model.train()
    speed = find_executable_batch_size(measure, micro_batch.size, micro_batch.halve)()
    model.zero_grad()
    trainer.forget_terms()
    tokens = steps * job.settings.batch * train.tokens.shape[1]
    job.console.print(f"about {speed:.0f} tokens/s: {minutes(tokens / speed)} for {tokens:,} tokens of healing")
