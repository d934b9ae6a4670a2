"""`factorize()`: a dense checkpoint and some text in, a sparse checkpoint out. The one loop over layers is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from factorllm.convert.finish import finish, measure_students
from factorllm.convert.held_out import advance_held_out
from factorllm.convert.job import Job, Student, open_job
from factorllm.convert.layer import convert_layer, passes
from factorllm.convert.partition import Partition
from factorllm.convert.read_me import finish_kinds, read_kinds_summary
from factorllm.convert.task import TOO_LARGE, LayerTask, Streams, Workplace
from factorllm.convert.write import (
    check_dtype,
    student_config,
    temper,
    write_companions,
    write_layer,
    write_outer_shards,
)
from factorllm.dense.ends import Ends
from factorllm.dense.families import ffn_layers
from factorllm.dense.layer import DecoderLayer, DenseLayer, LayerLoader
from factorllm.errors import FactorLLMError
from factorllm.hosts import StudentFFN
from factorllm.recipe import ReadMe, Recipe, parse_read_me, parse_recipe
from factorllm.report import ModelRow, Summary, read_summary
from factorllm.runs.apart import apart
from factorllm.runs.device import fast_products
from factorllm.runs.finite import is_finite
from factorllm.runs.given import given, given_if_any, given_settings
from factorllm.runs.memory import reuse_freed_memory
from factorllm.runs.output import located
from factorllm.runs.progress import Clock, Meter, meter
from factorllm.runs.settings import Settings
from factorllm.student.read import read_provenance


@apart()
@torch.no_grad()
def factorize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | ReadMe | str | Path,
    *,
    text: str | Path | None = None,
    images: str | Path | None = None,
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
        recipe: a `Recipe`, `S2A2E8`, `1R4E2K`, or the path of a YAML file; or a `ReadMe`, `read-me:K4`, which makes a
            static prune for each kind of text.
        text: a .txt/.jsonl/.json/.parquet file, a `datasets` id, or None to sample from the model itself.
        images: a folder of images, NAME.png with a caption in NAME.txt, for a vision-language model: up to half of the
            calibration is of them. The error of the FFNs is then measured on held-out images and text apart.
        overwrite: replace an `out` that factorllm made, once the new checkpoint is complete.
        console: where progress is shown; nothing is shown by default.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.

    Example:
        >>> settings = Settings(tokens=4096, held_out_tokens=512, length=64)
        >>> summary = factorize("dense", "student", "S2A2E8", text="my-text.txt", settings=settings)
        >>> [row.name for row in summary.rows]
        ['dense', 'student', 'pruned']
    """
    model, text, images = given(model), given_if_any(text), given_if_any(images)
    settings = given_settings(settings, Settings())
    if not isinstance(recipe, Recipe | ReadMe):
        recipe = parse_read_me(given(recipe)) or parse_recipe(recipe)
    if isinstance(recipe, ReadMe):
        return _factorize_kinds(model, out, recipe, text, images, settings, overwrite, console)
    recipes = {"student": recipe}
    if settings.baseline and not recipe.is_prune:
        recipes["pruned"] = recipe.static_prune()
    with open_job(model, out, recipes, text, settings, overwrite, console, images) as job:
        if job is None:
            return read_summary(located(out), read_provenance(located(out)))
        write_companions(job)
        _convert_layers(job)
        return finish(job, temper(job)) if job.ranks.is_main else None


def _factorize_kinds(
    model: str,
    out: str | Path,
    recipe: ReadMe,
    text: str | None,
    images: str | None,
    settings: Settings,
    overwrite: bool,
    console: Console | None,
) -> Summary | None:
    if text is None:
        raise FactorLLMError(f"recipe {recipe.name} looks for kinds of text among documents; give some with --text")
    if images is not None:
        raise FactorLLMError(f"recipe {recipe.name} looks for kinds of text, and images have none; leave --images out")
    recipes = {f"student-{kind}": recipe.prune for kind in range(recipe.kinds)}
    if settings.baseline:
        recipes["pruned"] = recipe.prune
    with open_job(model, out, recipes, text, settings, overwrite, console, kinds=recipe.kinds) as job:
        if job is None:
            return read_kinds_summary(located(out), recipe)
        write_companions(job)
        _convert_layers(job)
        return finish_kinds(job, temper(job), recipe) if job.ranks.is_main else None


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
) -> tuple[list[ModelRow], dict[str, list[dict[str, Any]]]]:
    """Measure many recipes on one model in one run: the teacher is computed once, and no checkpoint is kept.

    Like `factorize` it goes on where it was killed, from the folder `work.partial`.

    Args:
        visit: called with the row of the dense model and the model itself, then with those of each student.

    Returns:
        A row for the dense model and for each recipe, and for each recipe the statistics of the layers with an FFN.
    """
    with open_job(model, work, recipes, text, settings or Settings(), False, console) as job:
        if job is None:
            raise FactorLLMError(f"{work} holds what the same run made already; choose another folder to work in")
        _convert_layers(job)
        temper(job)
        rows = measure_students(job, visit)
        layers = {name: job.statistics(name) for name in recipes}
        job.work.discard()
        return rows, layers


def _convert_layers(job: Job) -> None:
    """The loop: for each layer, the teacher goes first; each student is then fitted toward it and follows."""
    reuse_freed_memory()
    check_dtype(job)
    settings, device = job.settings, job.settings.torch_device
    loader = LayerLoader(job.source, job.calibration.tokens.shape[1], settings.compute_dtype, device)
    _start_streams(job)
    if job.ranks.is_main:
        write_outer_shards(job)

    cut = {student.name: ffn_layers(student_config(job, student)) for student in job.students}
    done, steps = job.work.layers_done, _steps(job, list(cut.values()))
    with meter(job.console, "factorising", sum(steps), sum(steps[:done])) as bar:
        scratch = job.work.folder_at(f"scratch-{job.ranks.index}")
        limit, bearable = settings.memory_limit, job.bears_rounding
        workplace = Workplace(device, job.ranks, scratch, limit, bearable, settings.tune, bar.advance)
        for index in range(done, job.layers):
            bar.describe(f"layer {index + 1}/{job.layers}")
            clock = Clock()
            layer = loader.load(index)
            _advance(job, "teacher", layer, index, bar.advance)
            seconds, statistics, neurons = {"teacher": clock.lap()}, {}, {}
            for student in job.students:
                ffn = None
                if isinstance(layer, DenseLayer) and index in cut[student.name]:
                    ffn, split, statistics[student.name] = _convert(job, student, layer, index, workplace)
                    neurons[student.name] = split.order.tolist()
                else:
                    _advance_student(job, student, layer, index, bar)
                if job.ranks.is_main:
                    write_layer(job, student, index, ffn)
                seconds[student.name] = clock.lap()
            _commit_layer(job, index, statistics, neurons, seconds)


def _steps(job: Job, cut: list[Sequence[int]]) -> list[int]:
    """Times that a sequence goes through each layer, over all sequences.

    Args:
        cut: for each student, the layers whose FFN is cut.
    """
    each = passes(job.settings.tune)
    return [
        len(job.calibration) * (1 + sum(each if layer in layers else 1 for layers in cut))
        for layer in range(job.layers)
    ]


def _convert(
    job: Job, student: Student, layer: DenseLayer, index: int, workplace: Workplace
) -> tuple[StudentFFN, Partition, dict[str, Any]]:
    streams = Streams(
        sequences=job.calibration,
        teacher_after=job.stream("teacher", index + 1),
        before=job.stream(student.name, index),
        after=job.stream(student.name, index + 1),
    )
    generator = torch.Generator().manual_seed(job.settings.seed * 1_000_003 + index)
    # The journal, so that a resumed run looks where the killed one would have.
    done = job.statistics(student.name)
    ffn, split, statistics = convert_layer(
        LayerTask(
            layer,
            streams,
            student.recipe,
            student.shape,
            student.host,
            generator,
            workplace,
            strength_before=done[-1]["ridge_strength"] if done else None,
            own=job.own(student),
        )
    )
    if job.mixed:
        statistics["ffn_error"] = _advance_held_out(job, student, layer, index, ffn)
    return ffn, split, statistics


def _advance_held_out(job: Job, student: Student, layer: DenseLayer, index: int, ffn: StudentFFN) -> dict[str, float]:
    name = job.held_out_name(student)
    before, after = (job.stream(name, number) for number in (index, index + 1))
    return advance_held_out(layer, ffn, student.host, job.sequences(name), before, after, job.ranks)


def _advance_student(job: Job, student: Student, layer: DecoderLayer, index: int, bar: Meter) -> None:
    """Through a layer whose FFN is not cut, which is the dense model's."""
    _advance(job, student.name, layer, index, bar.advance)
    if job.mixed:
        _advance(job, job.held_out_name(student), layer, index)


def _advance(
    job: Job, name: str, layer: DecoderLayer, index: int, tick: Callable[[int], None] = lambda sequences: None
) -> None:
    """Write the hidden states of `name` after a whole dense layer."""
    before, after = job.stream(name, index), job.stream(name, index + 1)
    for run in before.runs():
        with fast_products(job.settings.torch_device, job.bears_rounding):
            states = layer.forward(before.read(run, job.settings.torch_device), job.sequences(name).beside(run))
        if not is_finite(states):
            raise FactorLLMError(f"layer {index} of {job.source.label} computes NaN or infinity: {TOO_LARGE}")
        after.write(run, states)
        tick(run.stop - run.start)


def _start_streams(job: Job) -> None:
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
    ends = Ends(job.source, job.settings.torch_device)
    for name in job.stream_names:
        rows = job.stream(name, 0)
        for run in rows.runs():
            rows.write(run, job.sequences(name).embed(run, ends.embed))


def _commit_layer(
    job: Job, index: int, statistics: dict[str, Any], neurons: dict[str, list[int]], seconds: dict[str, float]
) -> None:
    job.ranks.wait()  # the streams are whole only now
    if not job.ranks.is_main:
        return
    digests = {name: job.stream(name, index + 1).digest() for name in job.stream_names}
    entry = {"layer": index, "seconds": seconds, "streams": digests, "statistics": statistics, "neurons": neurons}
    job.work.commit(entry)
    for name in job.stream_names:
        job.stream(name, index).remove()
