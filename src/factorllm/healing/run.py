"""`heal()`: a finished student, its dense model and some text in; a better student of the same architecture out."""

from __future__ import annotations

import gc
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from rich.console import Console
from transformers.integrations import unset_hf_deepspeed_config

from factorllm.dense.safetensors import open_folder
from factorllm.dense.wrappers import wrap
from factorllm.healing.failures import Result, named_failures, retried
from factorllm.healing.job import HealJob, open_heal_job
from factorllm.healing.mor1e import lora_config, plain_adapters
from factorllm.healing.outcome import Outcome, read_outcome
from factorllm.healing.rate import settle_rate
from factorllm.healing.settings import HealSettings
from factorllm.healing.students import set_learning
from factorllm.healing.targets import Asked, Targets
from factorllm.healing.trainer import FactorTrainer
from factorllm.healing.training import micro_batch_of, train
from factorllm.measure.perplexity import perplexity, refuse_infinite
from factorllm.report import model_card
from factorllm.runs.apart import apart
from factorllm.runs.given import given, given_if_any, given_settings
from factorllm.runs.memory import reuse_freed_memory
from factorllm.runs.output import PROVENANCE, is_own, located
from factorllm.runs.progress import meter, quiet_transformers
from factorllm.runs.stored import as_stored
from factorllm.runs.workspace import write_json, write_text
from factorllm.student.adapters import adapter_folders, read_adapter, write_adapters
from factorllm.student.read import read_provenance

_STEADIER = "use a smaller --learning-rate, or --precision float32"


@dataclass(frozen=True)
class Healed:
    """What healing gave.

    Attributes:
        results: for `dense`, `student` (before) and `healed`, as in `report.result_table`; the static prune too, if it
            was measured on the same held-out text.
        outcome: what was gained, or why nothing was, in a sentence.
        seconds: wall time of teacher and training, of this run; None when it was done before.
    """

    out: Path
    results: dict[str, dict[str, Any]]
    tokens: int
    held_out_tokens: int
    text_origin: str
    outcome: str
    seconds: float | None


@apart()
def heal(
    student: str | Path,
    teacher: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
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
    folder, teacher, text = Path(given(student)), given(teacher), given_if_any(text)
    settings = given_settings(settings, HealSettings())
    reuse_freed_memory()
    with named_failures(), open_heal_job(folder, teacher, out, text, settings, overwrite, console) as job:
        if job is None:
            done = located(out)
            return _healed(done, read_provenance(done), None)
        start = time.monotonic()
        targets = _persistently(job, lambda: _ask_teacher(job))
        rate = settle_rate(job, targets)
        trainer, spikes = _persistently(job, lambda: train(job, targets, rate.value))
        outcome = read_outcome(trainer.state, rate, spikes.found, job.settings)
        folder = job.work.folder / "healed"
        unset_hf_deepspeed_config()  # else ZeRO would spread over the processes what only the main one loads from here
        if outcome.gained:
            _save(job, trainer, folder)
        elif job.ranks.is_main:
            _copy_student(job, folder)
        if not job.ranks.is_main:
            return None
        del trainer
        gc.collect()  # it refers to itself; its model and moments should be gone before others are loaded
        return _finish(job, folder, outcome, time.monotonic() - start)


def _persistently(job: HealJob, work: Callable[[], Result]) -> Result:
    """Do what goes on where it stopped. One of several processes cannot do so alone."""
    return retried(work, job.console.print) if job.ranks.count == 1 else work()


def _ask_teacher(job: HealJob) -> dict[str, Targets]:
    """The teacher's targets for the text to train and to validate on; the processes share what is not on disk yet."""
    folder, ranks = job.work.folder / "targets", job.ranks
    folder.mkdir(exist_ok=True)
    targets = {part: Targets(job.text[part], folder, part) for part in ("train", "validation")}
    missing = [(part, number) for part, data in targets.items() for number in data.missing()]
    ranks.wait()  # all must have looked before one writes
    if missing:
        recipe, settings, micro_batch = job.recipe, job.settings, micro_batch_of(job)
        asked = Asked(
            vocabulary=settings.vocabulary,
            temperature=settings.temperature,
            partitions=job.partitions,
            top_k=recipe.top_k,
            prior=recipe.prior,
            bfloat16=job.bfloat16,
            streams=settings.hidden_layers if settings.hidden_weight else 0,
        )
        teacher = job.teacher.load_model(torch.float32, job.device)
        mine = missing[ranks.index :: ranks.count]
        sequences = sum(targets[part].size_of(number) for part, number in mine)
        with meter(job.console, "asking the teacher", sequences) as bar:
            for part, number in mine:

                def compute(sequences: int, part: str = part, number: int = number) -> None:
                    targets[part].compute(number, teacher, asked, sequences, bar.advance)

                find_executable_batch_size(compute, micro_batch.size, micro_batch.halve)()
    ranks.wait()
    return targets


def _save(job: HealJob, trainer: FactorTrainer, folder: Path) -> None:
    """Write the healed weights by the student's names and in its dtype, and all its other files as they are."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not job.ranks.is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if job.settings.train == "mor1e":
        _copy_student(job, folder)
        config = lora_config(job.load(job.student), job.settings.kind_rank)
        write_adapters(folder, plain_adapters(state, job.intuition.kinds), config, job.intuition)
        return
    if job.settings.train == "lora":
        # What was trained may be spread over processes.
        adapted: Any = set_learning(job.load(job.student), job.settings)
        adapted.load_state_dict(state)
        model = adapted.merge_and_unload()
        state = model.state_dict()
    # FSDP gives tied weights a tensor each.
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in state.items() if name not in tied}
    stored = as_stored(state, job.made_with.stored_dtype, f"the training has diverged; {_STEADIER}")
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=stored)
    _, wrapper, whole = open_folder(job.student, str(job.student))
    if wrapper:
        wrap(folder, wrapper, whole)
    shutil.copytree(job.companions, folder, dirs_exist_ok=True)


def _copy_student(job: HealJob, folder: Path) -> None:
    """Write the student as it was, byte for byte."""
    folder.mkdir(exist_ok=True)
    for path in filter(is_own, job.student.glob("*.safetensors*")):
        shutil.copy(path, folder)
    shutil.copytree(job.companions, folder, dirs_exist_ok=True)


def _finish(job: HealJob, folder: Path, outcome: Outcome, seconds: float) -> Healed:
    """Measure, complete the checkpoint, and publish it."""
    made = job.made | {
        "results": _measure(job, folder),
        "healing": {
            "tokens": job.text["train"].numel(),
            "held_out_tokens": job.text["held_out"].numel(),
            "text": job.text_origin,
            "before": _healed_before(job.made),
            "settings": job.settings.model_dump(mode="json"),
            "soft_gates": job.soft_gates or (job.settings.gates == "soft" and bool(job.partitions) and outcome.gained),
            **outcome.as_dict(),
        },
        "job": job.identity,
    }
    write_json(folder / PROVENANCE, made)
    write_text(folder / "README.md", model_card(job.work.out.name, made, job.licence))
    runs = job.work.folder / "trainer" / "runs"
    if runs.exists():
        runs.rename(folder / "runs")
    job.work.publish(folder)
    return _healed(job.work.out, made, seconds)


def _healed_before(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and text of each healing that is in a student's weights already; those that gained nothing are not.

    Args:
        made: the student's `factorllm.json`.
    """
    last = made.get("healing") or {}
    gained = [{"tokens": last["tokens"], "text": last["text"]}] if last and last.get("best_step") != 0 else []
    return [*last.get("before", []), *gained]


def _healed(out: Path, made: dict[str, Any], seconds: float | None) -> Healed:
    """What a healing gave, by the `factorllm.json` that it wrote."""
    healing = made["healing"]
    told = healing.get("outcome", "")
    return Healed(out, made["results"], healing["tokens"], healing["held_out_tokens"], healing["text"], told, seconds)


def _with_adapters(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row of results with what adapters cost, all of which run for a token."""
    added = sum(
        part.numel() for kind in adapter_folders(folder) for pair in read_adapter(kind).values() for part in pair
    )
    costs = {"active_parameters": added, "total_parameters": added, "flops_per_token": 2 * added}
    return row | {name: row[name] + cost for name, cost in costs.items()}


def _measure(job: HealJob, folder: Path) -> dict[str, dict[str, Any]]:
    """Perplexity of the dense model, and of the student before and after, loaded from the files."""
    held_out, known = job.text["held_out"], job.made["results"]
    values = {}
    with meter(job.console, "measuring perplexity", 3 * len(held_out)) as bar:
        values["dense"] = perplexity(job.teacher.load_model(torch.float32, job.device), held_out, bar.advance)
        for name, checkpoint in (("student", job.student), ("healed", folder)):
            values[name] = perplexity(job.load(checkpoint), held_out, bar.advance)
    refuse_infinite(values, _STEADIER)
    rows = {"dense": known["dense"], "student": known["student"], "healed": _with_adapters(known["student"], folder)}
    rows = {name: row | {"perplexity": values[name]} for name, row in rows.items()}
    same_text = math.isclose(values["dense"], known["dense"]["perplexity"], rel_tol=1e-4)
    return rows | ({"pruned": known["pruned"]} if same_text and "pruned" in known else {})
