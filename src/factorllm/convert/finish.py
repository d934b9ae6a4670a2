"""The end of a conversion: measure the students from their files, say what made them, and publish the checkpoint."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from factorllm.convert.job import Job, Student
from factorllm.convert.write import student_config
from factorllm.dense.pretrained import load_pretrained
from factorllm.dense.wrappers import wrap
from factorllm.measure.cost import cost_of, dense_shape
from factorllm.measure.perplexity import perplexity, refuse_infinite
from factorllm.report import RUN_FILE, ModelRow, Spent, Summary, model_card
from factorllm.runs.identity import versions
from factorllm.runs.memory import give_back_freed_memory, peak_memory
from factorllm.runs.output import PROVENANCE
from factorllm.runs.progress import meter
from factorllm.runs.workspace import write_index, write_json, write_text
from factorllm.student.provenance import FORMAT
from factorllm.student.read import PARTITION_FILE


def finish(job: Job, logit_scales: dict[str, float]) -> Summary:
    """Measure, complete the student's checkpoint, and publish it."""
    rows, student = measure_students(job), job.students[0]
    summary = summary_of(job, student, rows, logit_scales, job.text.held_out.numel())
    complete(job, student, summary, job.work.out.name)
    spent = write_spent(job, student.folder)
    job.work.publish(student.folder)
    return replace(summary, spent=spent)


def summary_of(
    job: Job, student: Student, rows: list[ModelRow], logit_scales: dict[str, float], held_out_tokens: int
) -> Summary:
    """What is said of a student.

    Args:
        rows: what was measured, on `held_out_tokens`.

    Raises:
        FactorLLMError: when a perplexity is no number.
    """
    return Summary(
        base_model=job.base_model,
        out=job.work.out,
        recipe=student.recipe,
        host=student.host.name,
        engines=student.host.engines(job.source.config),
        text_origin=job.text.origin,
        calibration_tokens=job.text.calibration.numel(),
        held_out_tokens=held_out_tokens,
        rows=_finite_rows(job, rows),
        logit_scale=logit_scales[student.name],
        layers=job.statistics(student.name),
        images={"origin": job.images, **job.mixed.counts()} if job.mixed else None,
    )


def complete(job: Job, student: Student, summary: Summary, name: str) -> None:
    """Write what a student's checkpoint still lacks.

    Args:
        name: of the model, in its card.
    """
    made = provenance(job, summary)
    write_json(student.folder / PROVENANCE, made)
    write_json(
        student.folder / PARTITION_FILE, [entry["neurons"][student.name] for entry in job.ffn_entries(student.name)]
    )
    write_text(student.folder / "README.md", model_card(name, made, job.licence))
    if job.source.wrapper:
        wrap(student.folder, job.source.wrapper, job.source.tensors)
    # config.json comes last: without it, no engine takes the folder for a checkpoint.
    write_json(student.folder / "config.json", _written_config(job, student))


def write_spent(job: Job, folder: Path) -> Spent:
    """Say in a file what the run took: it differs from run to run, and all other files are the same bytes. Times are of
    all layers, those of earlier runs that were killed among them."""
    laps = [entry["seconds"] for entry in job.work.journal]
    baseline = sum(lap.get("pruned", 0.0) for lap in laps)
    spent = Spent(sum(sum(lap.values()) for lap in laps) - baseline, baseline, peak_memory())
    write_json(folder / RUN_FILE, asdict(spent) | {"machine": platform.platform()})
    return spent


def _written_config(job: Job, student: Student) -> dict:
    """What config.json says: of the whole model, where the student is the text model of one."""
    config, wrapper = student_config(job, student), job.source.wrapper
    if wrapper is None:
        return config.to_diff_dict()
    return wrapper.config_with(config, has_experts=student.shape.experts > 0).to_dict()


def measure_students(
    job: Job, visit: Callable[[ModelRow, PreTrainedModel], None] = lambda row, model: None
) -> list[ModelRow]:
    """Perplexity on held-out text of the dense model and of the students, loaded from the files that were written."""
    settings, dense = job.settings, job.source.config
    models = len(job.students) + 1
    with meter(job.console, "measuring perplexity", models * len(job.text.held_out)) as bar:
        give_back_freed_memory()
        model = job.source.load_model(settings.compute_dtype, settings.torch_device)
        rows = [
            ModelRow("dense", perplexity(model, job.text.held_out, bar.advance), cost_of(dense, dense_shape(dense)))
        ]
        visit(rows[0], model)
        for student in job.students:
            del model
            model = load_written(job, student)
            value = perplexity(model, job.text.held_out, bar.advance)
            rows.append(ModelRow(student.name, value, student.cost(dense)))
            visit(rows[-1], model)
    return rows


def load_written(job: Job, student: Student) -> PreTrainedModel:
    """A student, from the files that were written."""
    write_index(student.folder)
    give_back_freed_memory()
    model = load_pretrained(
        student.folder,
        student_config(job, student),
        job.source.wrapper,
        generation_config=job.source.generation_config(),
        dtype=job.settings.compute_dtype,
    )
    return model.to(job.settings.torch_device)


def _finite_rows(job: Job, rows: list[ModelRow]) -> list[ModelRow]:
    """The rows with a perplexity that is a number; only the static prune may have none."""
    refuse_infinite(
        {row.name: row.perplexity for row in rows if row.name != "pruned"},
        "use another copy of the model, or --dtype float32",
    )
    finite = [row for row in rows if math.isfinite(row.perplexity)]
    if len(finite) < len(rows):
        job.console.print("the perplexity of the static prune is no finite number, so the table has no row of it")
    return finite


def provenance(job: Job, summary: Summary) -> dict:
    """The content of `factorllm.json`: what made this checkpoint, and what came of it."""
    return {
        "format": FORMAT,
        "base_model": {"name": summary.base_model, "fingerprint": job.source.fingerprint},
        "recipe": summary.recipe.model_dump(),
        "host": summary.host,
        "engines": summary.engines,
        "data": {
            "origin": job.text.origin,
            "fingerprint": job.text.fingerprint,
            "calibration_tokens": summary.calibration_tokens,
            "held_out_tokens": summary.held_out_tokens,
            **({"images": summary.images} if summary.images else {}),
            **({"kinds_of": job.identity["text"]} if job.text.kinds is not None else {}),
        },
        "settings": job.settings.model_dump(mode="json"),
        "versions": versions(),
        "results": {row.name: row.as_dict() for row in summary.rows},
        "logit_scale": summary.logit_scale,
        "layers": summary.layers,
        "job": job.identity,
    }
