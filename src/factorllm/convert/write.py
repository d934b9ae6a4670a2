"""What a conversion writes of each student: what stands beside the weights, and the shards, each when it is known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.convert.job import Job, Student
from factorllm.convert.task import TOO_LARGE
from factorllm.convert.temperature import fit_logit_scale, sample_logits
from factorllm.dense.ends import Ends
from factorllm.dense.families import family_of, ffn_layers
from factorllm.dense.modules import final_norm_names
from factorllm.dense.names import HEAD, LAYERS, layer_prefix
from factorllm.errors import FactorLLMError, refusing
from factorllm.hosts import MoeHost, StudentFFN
from factorllm.runs.stored import as_stored, refuse_unstorable
from factorllm.runs.workspace import shard_name, write_shard
from factorllm.student.layout import outside_ffns


def write_companions(job: Job) -> None:
    """What stands beside the weights and comes from the dense model: what cannot be had is refused before the work."""
    if not job.ranks.is_main:
        return
    for student in job.students:
        _check_places(job, student)
    again = "mend it, or use another copy"
    for student in job.kept:
        with refusing(f"the tokenizer of {job.source.label}", again):
            job.source.tokenizer().save_pretrained(student.folder)
        with refusing(f"the generation config of {job.source.label}", again):
            job.source.generation_config().save_pretrained(student.folder)


def _check_places(job: Job, student: Student) -> None:
    """Refuse a student whose architecture has no place for something of the dense model, or a place for more.

    Raises:
        FactorLLMError: naming the first such tensor.
    """
    config, dense = student_config(job, student), job.source.config
    if not isinstance(student.host, MoeHost):
        return
    empty = {name: torch.empty(shape, device="meta") for name, shape in job.source.parameter_shapes().items()}
    written = {name for name in empty if not name.startswith(LAYERS)}
    for index in range(job.layers):
        prefix = layer_prefix(index)
        others = {name: empty[prefix + name] for name in _others(job, index, index in ffn_layers(config))}
        written |= {prefix + name for name in student.host.other_tensors(dense, others)}
    written = {name for name in written if not student.host.is_of_ffn(name, config)}
    if astray := sorted((written ^ outside_ffns(config, student.host).keys()) - {HEAD}):
        what = "it has no place for" if astray[0] in written else "it wants, and the dense model has not,"
        raise FactorLLMError(
            f"host {student.host.name} cannot hold this student exactly: {what} {astray[0]}; a static prune needs no "
            "host: factorllm prune"
        )


def check_dtype(job: Job) -> None:
    """Refuse before the work what the dtype of the written weights cannot hold of the dense model's."""
    wanted, source = job.settings.stored_dtype, job.source
    if job.ranks.is_main and not job.work.layers_done and wanted == torch.float16 != source.config.dtype:
        job.console.print("looking whether float16 holds all weights")
        refuse_unstorable(((name, source.tensor(name)) for name in source.parameter_names()), wanted)


def write_outer_shards(job: Job) -> None:
    """The first shard of each student: embeddings and output head, as in the dense model."""
    last = final_norm_names(job.source.skeleton())
    for name in last:
        job.source.tensor(name)  # needed at the end only, but a damaged one must be refused before the work
    names = [name for name in job.tensor_names if not name.startswith(LAYERS) and name not in last]
    for student in job.students:
        path = _shard(job, student, 1)
        if not path.exists():
            tensors = {name: job.source.tensor(name) for name in names}
            if not student.host.ties_embeddings:
                tensors[HEAD] = job.source.output_head().clone()
            write_shard(path, as_stored(tensors, job.settings.stored_dtype, TOO_LARGE))


def write_layer(job: Job, student: Student, index: int, ffn: StudentFFN | None) -> None:
    """The shard of a layer.

    Args:
        ffn: None for a layer without one.
    """
    source, prefix = job.source, layer_prefix(index)
    others = _others(job, index, ffn is not None)
    tensors = student.host.ffn_tensors(ffn, source.config) if ffn is not None else {}
    tensors |= student.host.other_tensors(source.config, {name: source.tensor(prefix + name) for name in others})
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    stored = as_stored(tensors, job.settings.stored_dtype, TOO_LARGE)
    write_shard(_shard(job, student, index + 2), stored)


def _others(job: Job, index: int, cut: bool) -> list[str]:
    """Names, within a layer, of the dense model's tensors; where its FFN is `cut`, of those beside it."""
    prefix, layout = layer_prefix(index), family_of(job.source.config).ffn
    names = (name.removeprefix(prefix) for name in job.tensor_names if name.startswith(prefix))
    return [name for name in names if not (cut and layout.holds(name))]


def temper(job: Job) -> dict[str, float]:
    """Fit each restored student's logit scale, and write its final norm, which carries the scale, as the last shard."""
    ends, words = Ends(job.source, job.settings.torch_device), job.source.config.vocab_size

    def logits(stream: str, own: Tensor | None) -> Tensor:
        return sample_logits(job.stream(stream, job.layers), job.calibration, ends, words, own)

    scales = {}
    # A factor before a cap is none after it.
    is_capped = bool(getattr(job.source.config, "final_logit_softcapping", None))
    for student in job.students:
        scale = 1.0
        if student.recipe.restore != "none" and not is_capped:
            own = job.own(student)
            scale = fit_logit_scale(logits("teacher", own), logits(student.name, own))
        tensors = as_stored(ends.scaled_norm(scale), job.settings.stored_dtype, TOO_LARGE)
        write_shard(_shard(job, student, job.layers + 2), tensors)
        scales[student.name] = scale
    return scales


def _shard(job: Job, student: Student, number: int) -> Path:
    """The file of a student's shard: first the embeddings, then each layer, and last the final norm."""
    return student.folder / shard_name(number, job.layers + 2)


def student_config(job: Job, student: Student) -> PreTrainedConfig:
    config = student.host.config(job.source.config, student.shape)
    config.dtype = job.settings.stored_dtype
    return config
