"""`heal()`: a finished student, its dense model and some text in; a better student of the same architecture out."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available, unset_hf_deepspeed_config

from factorllm.healing.experts import use_autocast
from factorllm.healing.job import HealJob, open_heal_job
from factorllm.healing.settings import HealSettings
from factorllm.healing.students import set_learning
from factorllm.healing.targets import Asked, Targets
from factorllm.healing.trainer import FactorTrainer, ProgressCallback
from factorllm.measure.perplexity import perplexity, refuse_infinite
from factorllm.report import model_card
from factorllm.runs.memory import reuse_freed_memory
from factorllm.runs.output import PROVENANCE, located
from factorllm.runs.progress import meter, minutes, quiet_transformers
from factorllm.runs.stored import as_stored
from factorllm.runs.workspace import write_json, write_text
from factorllm.student.read import read_provenance
from factorllm.student.routers import Routers

_LOGS = 50
"""Points of the loss curve."""

_STEADIER = "use a smaller --learning-rate, or --precision float32"

_CURVE = ("loss", "kd", "pa", "balance", "label", "hidden", "eval_loss")


@dataclass(frozen=True)
class Healed:
    """What healing gave.

    Attributes:
        results: for `dense`, `student` (before) and `healed`, as in `report.result_table`; the static prune too, if it
            was measured on the same held-out text.
        seconds: wall time of teacher and training, of this run; None when it was done before.
    """

    out: Path
    results: dict[str, dict[str, Any]]
    tokens: int
    held_out_tokens: int
    text_origin: str
    seconds: float | None


def heal(
    student: str | Path,
    teacher: str,
    out: str | Path,
    *,
    text: str | None = None,
    settings: HealSettings | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Healed | None:
    """Fine-tune a student toward its dense model, and write it to `out` as the same host architecture.

    A killed run goes on when it is called again with the same arguments, with the same losses; a finished one is not
    repeated. Under `accelerate launch` the processes share the work; only the main one returns a result.

    Args:
        student: a checkpoint that `factorize` or `heal` made, a static prune among them.
        teacher: the dense model that it was made from: a hub id, a folder of safetensors, or a `.gguf` file.
        text: as for `factorize`; with the same text, the same part stays held out.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.

    Example:
        >>> settings = HealSettings(tokens=1024, validation_tokens=256, evaluations=1)
        >>> healed = heal("student", "dense", "healed", text="my-text.txt", settings=settings)
        >>> sorted(healed.results)
        ['dense', 'healed', 'pruned', 'student']
    """
    settings = settings or HealSettings()
    reuse_freed_memory()
    with open_heal_job(Path(student), teacher, out, text, settings, overwrite, console) as job:
        if job is None:
            return _read_healed(located(out))
        start = time.monotonic()
        targets = _ask_teacher(job)
        trainer = _train(job, targets)
        folder = job.work.folder / "healed"
        unset_hf_deepspeed_config()  # else ZeRO would spread over the processes what only the main one loads from here
        _save(job, trainer, folder)
        if not job.ranks.is_main:
            return None
        return _finish(job, folder, trainer.state.log_history, time.monotonic() - start)


def _ask_teacher(job: HealJob) -> dict[str, Targets]:
    """The teacher's targets for the text to train and to validate on; the processes share what is not on disk yet."""
    folder, ranks = job.work.folder / "targets", job.ranks
    folder.mkdir(exist_ok=True)
    targets = {part: Targets(job.text[part], folder, part) for part in ("train", "validation")}
    missing = [(part, number) for part, data in targets.items() for number in data.missing()]
    ranks.wait()  # all must have looked before one writes
    if missing:
        recipe, settings = job.recipe, job.settings
        asked = Asked(
            vocabulary=settings.vocabulary,
            temperature=settings.temperature,
            partitions=job.partitions,
            top_k=recipe.top_k,
            prior=recipe.prior,
            bfloat16=job.bfloat16,
            streams=settings.hidden_layers if settings.hidden_weight else 0,
            batch=settings.micro_batch,
        )
        teacher = job.teacher.load_model(torch.float32, job.device)
        mine = missing[ranks.index :: ranks.count]
        sequences = sum(targets[part].size_of(number) for part, number in mine)
        with meter(job.console, "asking the teacher", sequences) as bar:
            for part, number in mine:
                targets[part].compute(number, teacher, asked, bar.advance)
    ranks.wait()
    return targets


def _train(job: HealJob, targets: dict[str, Targets]) -> FactorTrainer:
    settings = job.settings
    torch.manual_seed(job.made_with.seed)
    model = job.load(job.student)
    routers = Routers(model)
    if routers.modules:
        use_autocast(model, job.device)
    if settings.gates == "soft":
        routers.unflatten()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learner = set_learning(model, settings)
    steps = settings.epochs * (len(targets["train"]) // settings.batch)
    resume = _last_checkpoint(job.work.folder / "trainer")
    done = int(resume.name.rpartition("-")[2]) if resume else 0
    trainer = FactorTrainer(
        learner,
        settings,
        routers,
        job.bfloat16,
        args=_arguments(job, steps, done),
        train_dataset=targets["train"],
        eval_dataset=targets["validation"],
        callbacks=[EarlyStoppingCallback(settings.patience)],
    )
    trainer.remove_callback(PrinterCallback)  # progress is told by ours
    _predict(job, trainer, targets["train"], steps - done)
    with meter(job.console, "healing", steps, done) as bar:
        trainer.add_callback(ProgressCallback(bar.advance, job.console.print))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def _arguments(job: HealJob, steps: int, done: int) -> TrainingArguments:
    settings = job.settings
    every = math.ceil(steps / settings.evaluations)
    accumulate = settings.batch // (settings.micro_batch * job.ranks.count)
    arguments = TrainingArguments(
        output_dir=str(job.work.folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        per_device_eval_batch_size=settings.micro_batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=settings.peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 20),
        max_grad_norm=1.0,
        logging_steps=max(steps // _LOGS, 1),
        eval_strategy="steps",
        eval_on_start=done == 0,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        use_cpu=job.device.type == "cpu",
        seed=job.made_with.seed,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
    )
    arguments.mixed_precision = "no"  # whatever the launcher says: `--precision` decides, and the trainer does it
    return arguments


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: the Trainer writes its state last."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(checkpoints):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
    return None


def _predict(job: HealJob, trainer: FactorTrainer, train: Targets, steps: int) -> None:
    """Time one part of a batch and say how long training will take."""
    settings = job.settings
    if job.ranks.count > 1 or steps <= 0:
        return  # the model is not wrapped yet, so a step here would not be a step there
    batch = trainer.data_collator([train[i] for i in range(settings.micro_batch)])
    inputs = {name: tensor.to(job.device) for name, tensor in batch.items()}
    model: Any = trainer.model
    model.train()
    for _ in range(2):  # the first one also warms up
        start = time.monotonic()
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(model, inputs).backward()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
    model.zero_grad()
    trainer.forget_terms()
    speed = inputs["input_ids"].numel() / seconds
    tokens = steps * settings.batch * inputs["input_ids"].shape[1]
    job.console.print(f"about {speed:.0f} tokens/s: {minutes(tokens / speed)} for {tokens:,} tokens of healing")


def _save(job: HealJob, trainer: FactorTrainer, folder: Path) -> None:
    """Write the healed weights by the student's names and in its dtype, and all its other files as they are."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not job.ranks.is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job.settings.train == "lora":
        whole: Any = set_learning(job.load(job.student), job.settings)  # what was trained may be spread over processes
        whole.load_state_dict(state)
        model = whole.merge_and_unload()
        state = model.state_dict()
    # FSDP gives tied weights a tensor each.
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    stored = as_stored(state, job.made_with.stored_dtype, f"the training has diverged; {_STEADIER}")
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=stored)
    for path in job.companions.iterdir():
        shutil.copy(path, folder)


def _finish(job: HealJob, folder: Path, history: list[dict[str, Any]], seconds: float) -> Healed:
    """Measure, complete the checkpoint, and publish it."""
    results = _measure(job, folder)
    tokens = job.text["train"].numel()
    made = job.made | {
        "results": results,
        "healing": {
            "tokens": tokens,
            "held_out_tokens": job.text["held_out"].numel(),
            "text": job.text_origin,
            "settings": job.settings.model_dump(mode="json"),
            "curve": _curve(history),
        },
        "job": job.identity,
    }
    write_json(folder / PROVENANCE, made)
    write_text(folder / "README.md", model_card(job.work.out.name, made, job.licence))
    runs = job.work.folder / "trainer" / "runs"
    if runs.exists():
        runs.rename(folder / "runs")
    job.work.publish(folder)
    return Healed(job.work.out, results, tokens, job.text["held_out"].numel(), job.text_origin, seconds)


def _read_healed(out: Path) -> Healed:
    """What a healing gave that was done before."""
    made = read_provenance(out)
    healing = made["healing"]
    return Healed(out, made["results"], healing["tokens"], healing["held_out_tokens"], healing["text"], None)


def _curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses in what the Trainer logged, which also holds times."""
    points = [{"step": entry["step"]} | {key: entry[key] for key in _CURVE if key in entry} for entry in history]
    return [point for point in points if len(point) > 1]


def _measure(job: HealJob, folder: Path) -> dict[str, dict[str, Any]]:
    """Perplexity of the dense model, and of the student before and after, loaded from the files."""
    held_out, known = job.text["held_out"], job.made["results"]
    values = {}
    with meter(job.console, "measuring perplexity", 3 * len(held_out)) as bar:
        values["dense"] = perplexity(job.teacher.load_model(torch.float32, job.device), held_out, bar.advance)
        for name, checkpoint in (("student", job.student), ("healed", folder)):
            values[name] = perplexity(job.load(checkpoint), held_out, bar.advance)
    refuse_infinite(values, _STEADIER)
    rows = {"dense": known["dense"], "student": known["student"], "healed": known["student"]}
    rows = {name: row | {"perplexity": values[name]} for name, row in rows.items()}
    same_text = math.isclose(values["dense"], known["dense"]["perplexity"], rel_tol=1e-4)
    return rows | ({"pruned": known["pruned"]} if same_text and "pruned" in known else {})
