"""`factorize()`: a dense checkpoint and some text in, a sparse checkpoint out. The one loop over layers is here."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel

from factorllm.convert.job import Job, Student, open_job
from factorllm.convert.layer import TOO_LARGE, LayerConversion, Streams, Workplace, passes
from factorllm.convert.partition import Partition
from factorllm.convert.temperature import fit_logit_scale, sample_logits
from factorllm.dense.layer import DenseLayer, LayerLoader
from factorllm.dense.pretrained import load_pretrained
from factorllm.errors import FactorLLMError, refusing
from factorllm.hosts import StudentFFN
from factorllm.measure import cost_of, perplexity, refuse_infinite
from factorllm.measure.cost import dense_shape
from factorllm.recipe import Recipe, parse_recipe
from factorllm.report import RUN_FILE, ModelRow, Spent, Summary, model_card, read_summary
from factorllm.runs.finite import is_finite
from factorllm.runs.identity import versions
from factorllm.runs.memory import peak_memory, reuse_freed_memory
from factorllm.runs.output import PROVENANCE, located
from factorllm.runs.progress import Clock, Meter, meter
from factorllm.runs.settings import Settings
from factorllm.runs.stored import as_stored, refuse_unstorable
from factorllm.runs.workspace import (
    shard_name,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from factorllm.student.provenance import FORMAT
from factorllm.student.read import PARTITION_FILE, read_provenance
from factorllm.text.calibration import public_name

FINAL_NORM = "model.norm.weight"


@torch.no_grad()
def factorize(
    model: str,
    out: str | Path,
    recipe: Recipe | str,
    *,
    text: str | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Summary | None:
    """Turn a dense model into a sparse Mixture of Experts and write it to `out`.

    A killed run goes on when it is called again with the same arguments, and ends with the same bytes; a finished one
    is not repeated. Under `accelerate launch` the processes share the calibration text; only the main one returns a
    summary.

    Args:
        model: a hub id, a folder of safetensors, or a `.gguf` file.
        recipe: a `Recipe`, `S2A2E8`, `1R4E2K`, or the path of a YAML file.
        text: a .txt/.jsonl/.json/.parquet file, a `datasets` id, or None to sample from the model itself.
        overwrite: replace an `out` that factorllm made, once the new checkpoint is complete.
        console: where progress is shown; nothing is shown by default.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.
    """
    settings = settings or Settings()
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    recipes = {"student": recipe}
    if settings.baseline and not recipe.is_prune:
        recipes["pruned"] = recipe.static_prune()
    with open_job(model, out, recipes, text, settings, overwrite, console) as job:
        if job is None:
            return read_summary(located(out), read_provenance(located(out)))
        _write_companions(job)
        _convert_layers(job)
        return _finish(job, _temper(job)) if job.ranks.is_main else None


@torch.no_grad()
def compare(
    model: str,
    work: str | Path,
    recipes: dict[str, Recipe],
    *,
    text: str | None = None,
    settings: Settings | None = None,
    console: Console | None = None,
    visit: Callable[[ModelRow, PreTrainedModel], None] = lambda row, model: None,
) -> tuple[list[ModelRow], dict[str, list[dict]]]:
    """Measure many recipes on one model in one run: the teacher is computed once, and no checkpoint is kept.

    Like `factorize` it goes on where it was killed, from the folder `work.partial`.

    Args:
        visit: called with the row of the dense model and the model itself, then with those of each student.

    Returns:
        A row for the dense model and for each recipe, and for each recipe the statistics of its layers.
    """
    with open_job(model, work, recipes, text, settings or Settings(), False, console) as job:
        _convert_layers(job)
        _temper(job)
        rows = _measure(job, visit)
        layers = {name: [entry["statistics"][name] for entry in job.work.journal] for name in recipes}
        job.work.discard()
        return rows, layers


def _convert_layers(job: Job) -> None:
    """The loop: for each layer, the teacher goes first; each student is then fitted toward it and follows."""
    reuse_freed_memory()
    _check_dtype(job)
    settings, device = job.settings, job.settings.torch_device
    loader = LayerLoader(job.source, settings.length, settings.compute_dtype, device)
    _start_streams(job, loader)
    if job.ranks.is_main:
        _write_outer_shards(job)

    steps = len(job.text.calibration) * (1 + passes(settings.tune) * len(job.students))
    done = job.work.layers_done
    with meter(job.console, "factorising", job.layers * steps, done * steps) as bar:
        scratch = job.work.folder_at(f"scratch-{job.ranks.index}")
        workplace = Workplace(device, job.ranks, scratch, settings.memory_limit, settings.tune, bar.advance)
        for index in range(done, job.layers):
            bar.describe(f"layer {index + 1}/{job.layers}")
            clock = Clock()
            layer = loader.load(index)
            _advance_teacher(job, layer, index, bar)
            seconds, statistics, neurons = {"teacher": clock.lap()}, {}, {}
            for student in job.students:
                ffn, split, statistics[student.name] = _convert(job, student, layer, index, workplace)
                neurons[student.name] = split.order.tolist()
                if job.ranks.is_main:
                    _write_layer(job, student, index, ffn)
                seconds[student.name] = clock.lap()
            _commit_layer(job, index, statistics, neurons, seconds)


def _write_companions(job: Job) -> None:
    """What stands beside the weights and comes from the dense model: what cannot be had is refused before the work."""
    if not job.ranks.is_main:
        return
    for student in job.students:
        _config(job, student)
    folder, again = job.students[0].folder, "mend it, or use another copy"
    with refusing(f"the tokenizer of {job.source.label}", again):
        job.source.tokenizer().save_pretrained(folder)
    with refusing(f"the generation config of {job.source.label}", again):
        job.source.generation_config().save_pretrained(folder)


def _convert(
    job: Job, student: Student, layer: DenseLayer, index: int, workplace: Workplace
) -> tuple[StudentFFN, Partition, dict]:
    streams = Streams(
        teacher_after=job.stream("teacher", index + 1),
        before=job.stream(student.name, index),
        after=job.stream(student.name, index + 1),
    )
    generator = torch.Generator().manual_seed(job.settings.seed * 1_000_003 + index)
    return LayerConversion(layer, streams, student.recipe, student.shape, student.host, generator, workplace).run()


def _advance_teacher(job: Job, layer: DenseLayer, index: int, bar: Meter) -> None:
    before, after = job.stream("teacher", index), job.stream("teacher", index + 1)
    for run in before.runs():
        states = layer.forward(before.read(run, job.settings.torch_device))
        if not is_finite(states):
            raise FactorLLMError(f"layer {index} of {job.source.label} computes NaN or infinity: {TOO_LARGE}")
        after.write(run, states)
        bar.advance(run.stop - run.start)


def _start_streams(job: Job, loader: LayerLoader) -> None:
    """Embed the text, or check that the hidden states of a resumed run are what was journalled."""
    done = job.work.layers_done
    if done:
        journalled = job.work.journal[-1]["streams"]
        if any(job.stream(name, done).digest() != journalled[name] for name in job.stream_names):
            raise FactorLLMError(
                f"the hidden states in {job.work.folder} are damaged, so the run cannot go on; remove the folder and "
                "start again"
            )
        return
    embeddings = loader.embeddings()
    for name in job.stream_names:
        rows = job.stream(name, 0)
        for run in rows.runs():
            rows.write(run, embeddings[job.text.calibration[run]])


def _commit_layer(
    job: Job, index: int, statistics: dict, neurons: dict[str, list[int]], seconds: dict[str, float]
) -> None:
    job.ranks.wait()  # the streams are whole only now
    if not job.ranks.is_main:
        return
    digests = {name: job.stream(name, index + 1).digest() for name in job.stream_names}
    entry = {"layer": index, "seconds": seconds, "streams": digests, "statistics": statistics, "neurons": neurons}
    job.work.commit(entry)
    for name in job.stream_names:
        job.stream(name, index).remove()


def _check_dtype(job: Job) -> None:
    """Refuse before the work what the dtype of the written weights cannot hold of the dense model's."""
    wanted, source = job.settings.stored_dtype, job.source
    if job.ranks.is_main and not job.work.layers_done and wanted == torch.float16 != source.config.dtype:
        job.console.print("looking whether float16 holds all weights")
        refuse_unstorable(((name, source.tensor(name)) for name in source.parameter_names()), wanted)


def _write_outer_shards(job: Job) -> None:
    """The first shard of each student: embeddings and output head, as in the dense model."""
    job.source.tensor(FINAL_NORM)  # needed at the end only, but a damaged one must be refused before the work
    names = [name for name in job.source.parameter_names() if not name.startswith(("model.layers.", FINAL_NORM))]
    for student in job.students:
        path = student.folder / shard_name(1, _shards(job))
        if not path.exists():
            tensors = {name: job.source.tensor(name) for name in names}
            if not student.host.ties_embeddings:
                tensors["lm_head.weight"] = job.source.output_head().clone()
            write_shard(path, as_stored(tensors, job.settings.stored_dtype, TOO_LARGE))


def _temper(job: Job) -> dict[str, float]:
    """Fit each restored student's logit scale, and write its final norm, which carries the scale, as the last shard."""
    norm, eps = job.source.tensor(FINAL_NORM), job.source.config.rms_norm_eps
    head = job.source.output_head().to(job.settings.torch_device)
    norm = norm.to(head.device)
    teacher = sample_logits(job.stream("teacher", job.layers), norm, eps, head)
    scales = {}
    for student in job.students:
        scale = 1.0
        if student.recipe.restore != "none":
            scale = fit_logit_scale(teacher, sample_logits(job.stream(student.name, job.layers), norm, eps, head))
        tensors = as_stored({FINAL_NORM: norm.float() * scale}, job.settings.stored_dtype, TOO_LARGE)
        write_shard(student.folder / shard_name(_shards(job), _shards(job)), tensors)
        scales[student.name] = scale
    return scales


def _shards(job: Job) -> int:
    """Shards of a student: the embeddings, each layer, and the final norm."""
    return job.layers + 2


def _write_layer(job: Job, student: Student, index: int, ffn: StudentFFN) -> None:
    prefix = f"model.layers.{index}."
    names = [name for name in job.source.names() if name.startswith(prefix) and ".mlp." not in name]
    tensors = {name: job.source.tensor(name) for name in sorted(names)}
    added = student.host.attention_tensors(job.source.config) | student.host.ffn_tensors(ffn)
    tensors |= {prefix + name: tensor for name, tensor in added.items()}
    stored = as_stored(tensors, job.settings.stored_dtype, TOO_LARGE)
    write_shard(student.folder / shard_name(index + 2, _shards(job)), stored)


def _finish(job: Job, logit_scales: dict[str, float]) -> Summary:
    """Measure, complete the student's checkpoint, and publish it."""
    rows = _finite(job, _measure(job))
    student = job.students[0]
    summary = Summary(
        base_model=public_name(job.source.label),
        out=job.work.out,
        recipe=student.recipe,
        host=student.host.name,
        engines=student.host.engines(job.source.config),
        text_origin=job.text.origin,
        calibration_tokens=job.text.calibration.numel(),
        held_out_tokens=job.text.held_out.numel(),
        rows=rows,
        logit_scale=logit_scales[student.name],
        layers=[entry["statistics"][student.name] for entry in job.work.journal],
    )
    made = _provenance(job, summary)
    write_json(student.folder / PROVENANCE, made)
    write_json(student.folder / PARTITION_FILE, [entry["neurons"][student.name] for entry in job.work.journal])
    write_text(student.folder / "README.md", model_card(job.work.out.name, made, job.licence))
    spent = _spent(job)
    # Time and memory differ from run to run; they are kept apart so that all other files are the same bytes.
    write_json(student.folder / RUN_FILE, asdict(spent) | {"machine": platform.platform()})
    # config.json comes last: without it, no engine takes the folder for a checkpoint.
    write_json(student.folder / "config.json", _config(job, student).to_diff_dict())
    job.work.publish(student.folder)
    return replace(summary, spent=spent)


def _spent(job: Job) -> Spent:
    """Times of all layers, those of earlier runs that were killed among them."""
    laps = [entry["seconds"] for entry in job.work.journal]
    baseline = sum(lap.get("pruned", 0.0) for lap in laps)
    return Spent(sum(sum(lap.values()) for lap in laps) - baseline, baseline, peak_memory())


def _config(job: Job, student: Student) -> PreTrainedConfig:
    config = student.host.config(job.source.config, student.shape)
    config.dtype = job.settings.stored_dtype
    return config


def _measure(job: Job, visit: Callable[[ModelRow, PreTrainedModel], None] = lambda row, model: None) -> list[ModelRow]:
    """Perplexity on held-out text of the dense model and of the students, loaded from the files that were written."""
    settings, dense = job.settings, job.source.config
    models = len(job.students) + 1
    with meter(job.console, "measuring perplexity", models * len(job.text.held_out)) as bar:
        model = job.source.load_model(settings.compute_dtype, settings.torch_device)
        rows = [
            ModelRow("dense", perplexity(model, job.text.held_out, bar.advance), cost_of(dense, dense_shape(dense)))
        ]
        visit(rows[0], model)
        for student in job.students:
            write_index(student.folder)
            model = load_pretrained(
                student.folder,
                config=_config(job, student),
                generation_config=job.source.generation_config(),
                dtype=settings.compute_dtype,
            ).to(settings.torch_device)
            value = perplexity(model, job.text.held_out, bar.advance)
            rows.append(ModelRow(student.name, value, student.cost(dense)))
            visit(rows[-1], model)
    return rows


def _finite(job: Job, rows: list[ModelRow]) -> list[ModelRow]:
    """The rows with a perplexity that is a number; only the static prune may have none."""
    refuse_infinite(
        {row.name: row.perplexity for row in rows if row.name != "pruned"},
        "use another copy of the model, or --dtype float32",
    )
    finite = [row for row in rows if math.isfinite(row.perplexity)]
    if len(finite) < len(rows):
        job.console.print("the perplexity of the static prune is no finite number, so the table has no row of it")
    return finite


def _provenance(job: Job, summary: Summary) -> dict:
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
        },
        "settings": job.settings.model_dump(mode="json"),
        "versions": versions(),
        "results": {row.name: row.as_dict() for row in summary.rows},
        "logit_scale": summary.logit_scale,
        "layers": summary.layers,
        "job": job.identity,
    }
