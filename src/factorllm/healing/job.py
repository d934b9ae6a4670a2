"""A healing, opened and checked: student, teacher, text, and the workspace that it may go on in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from factorllm.convert.partition import Partition
from factorllm.dense import ModelSource, open_model
from factorllm.dense.families import ffn_width
from factorllm.dense.pretrained import load_generation_config
from factorllm.errors import FactorLLMError, refusing
from factorllm.healing.mor1e import check_whole, find_kinds
from factorllm.healing.rounding import check_rounded
from factorllm.healing.settings import HealSettings
from factorllm.healing.students import check_learning, has_soft_gates
from factorllm.recipe import Recipe, Shape
from factorllm.runs.device import has_bfloat16
from factorllm.runs.digest import digest_of
from factorllm.runs.disk import require_space
from factorllm.runs.identity import common_identity
from factorllm.runs.memory import require_memory
from factorllm.runs.output import CHECKPOINT, TEMPLATES, check_output, companions, located, own_files
from factorllm.runs.ranks import Ranks
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import Workspace, finish_publishing, open_checkpoint_job, write_shard
from factorllm.student.adapters import Mixture, refuse_adapters
from factorllm.student.read import (
    check_shape,
    load_student,
    read_partitions,
    read_provenance,
    refuse_text_of_kinds,
)
from factorllm.text import CalibrationText
from factorllm.text.calibration import hold_out, refuse_too_few, say_notes, text_origin
from factorllm.text.intuition import Intuition
from factorllm.text.parts import Parts, open_text, sequences_of

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class HealJob:
    """Everything that healing needs.

    Attributes:
        made: the student's `factorllm.json`.
        identity: everything that decides the result.
        licence: what the teacher states, if it states one.
        shape: of the recipe on this dense model.
        partitions: each layer's experts; empty for a static prune.
        soft_gates: whether an earlier healing made the student's gates soft.
        made_with: the settings that the student was made with, on this machine's device.
        text: token sequences (n, length) by part: `train`, `validation` and `held_out`.
        ranks: the processes that heal together.
    """

    student: Path
    made: dict
    identity: dict
    licence: str | None
    recipe: Recipe
    shape: Shape
    partitions: list[Partition]
    soft_gates: bool
    teacher: ModelSource
    settings: HealSettings
    made_with: Settings
    text: dict[str, Tensor]
    text_origin: str
    work: Workspace
    ranks: Ranks
    console: Console

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def companions(self) -> Path:
        """What stands beside the student's weights."""
        return self.work.folder_at("companions")

    @property
    def bfloat16(self) -> bool:
        """Whether matrix products are computed in bfloat16."""
        if self.settings.precision != "auto":
            return self.settings.precision == "bfloat16"
        return has_bfloat16(self.device)

    def mixture(self) -> Mixture:
        """Kinds of the text that is trained on."""
        return Mixture(self.intuition, self.teacher.tokenizer())

    @cached_property
    def intuition(self) -> Intuition:
        """Of the kinds that are found in the text that is trained on."""
        return find_kinds(self.text["train"], self.teacher.tokenizer(), self.settings.kinds, self.made_with.seed)

    def load(self, checkpoint: Path) -> PreTrainedModel:
        """The student, before or after, with fp32 weights."""
        return load_student(checkpoint, device=self.device)


@contextmanager
def open_heal_job(
    student: Path,
    teacher: str,
    out: str | Path,
    text: str | None,
    settings: HealSettings,
    overwrite: bool,
    console: Console | None,
) -> Iterator[HealJob | None]:
    """Open and check everything, the cheap checks first; the main process holds the workspace while the block runs.

    None stands for a job that is done: `out` was made by the same one.
    """
    out = located(out)
    finish_publishing(out)
    check_output(out, CHECKPOINT, [student, teacher, text])
    made = read_provenance(student)
    refuse_text_of_kinds(student, made, text)
    recipe = Recipe(**made["recipe"])
    source = open_model(teacher)
    _check_teacher(student, made, source)
    shape = recipe.shape(ffn_width(source.config))
    check_shape(student, shape)
    soft_gates = has_soft_gates(made, recipe)
    check_learning(settings, recipe, soft_gates)
    check_rounded(student, settings)
    refuse_adapters(student, "its own weights are those of the student that it was made of: heal that one")
    if settings.train == "mor1e":
        check_whole(student)
    partitions = [] if recipe.is_prune else read_partitions(student, shape)
    made_with = Settings(**made["settings"] | {"device": settings.device}).resolve(source.config)
    ranks = Ranks(made_with)
    _check_batch(settings, ranks.count)
    console = ranks.console(console)
    identity = {
        "student": digest_of([*companions(student), *sorted(student.glob("*.safetensors"))]),
        "teacher": source.fingerprint,
        "files beside the teacher's weights": source.surroundings,
        **common_identity(text, settings.model_copy(update={"device": str(ranks.device)})),
    }
    with open_checkpoint_job(out, identity, overwrite, ranks) as work:
        if work is None:
            yield None
            return
        with ranks.main_first():
            tokens = _read_text(work, source, made, text, settings, made_with, console)
        origin = text_origin(text, cut=bool(tokens.pop("cut")))
        job = HealJob(
            student, made, identity, source.licence, recipe, shape, partitions, soft_gates, source, settings, made_with,
            tokens, origin, work, ranks, console,
        )  # fmt: skip
        if ranks.is_main:
            _check_disk(job)
            _check_memory(job)
            _copy_companions(job)
        yield job


def _copy_companions(job: HealJob) -> None:
    """Keep what stands beside the student's weights, for it is written beside the healed ones."""
    if (job.student / _GENERATION).exists():  # transformers writes it with the weights, or refuses to
        with refusing(job.student / _GENERATION, "mend it"):
            load_generation_config(job.student).save_pretrained(job.companions)
    for path in own_files(job.student):
        shutil.copy(path, job.companions)
    if (named := job.student / TEMPLATES).is_dir():
        shutil.copytree(named, job.companions / TEMPLATES, dirs_exist_ok=True)


def _check_disk(job: HealJob) -> None:
    """Refuse before the work when the disk is plainly too small: for two of the Trainer's checkpoints, at their least,
    the healed weights, and what the teacher says of each token."""
    parameters = job.made["results"]["student"]["total_parameters"]
    weights = parameters * (2 * torch.float32.itemsize + job.made_with.stored_dtype.itemsize)
    likely = job.settings.vocabulary * (torch.int32.itemsize + torch.float16.itemsize)
    priors = sum(len(partition.experts) for partition in job.partitions) * torch.float16.itemsize
    needed = weights + job.text["train"].numel() * (likely + priors)
    if not (job.work.folder / "targets").exists():
        require_space(job.work.out, needed, "free some, choose another output folder, or use fewer --tokens")


def _check_memory(job: HealJob) -> None:
    """Refuse before the work when memory is plainly too small for what every step needs; activations come on top."""
    if job.device.type != "cpu" or job.ranks.count > 1:  # of several, FSDP may give each a share
        return
    whole, purpose = 1, "the weights in fp32"
    instead = "close other programs, or heal on a machine with more"
    if job.settings.quantize:
        whole, purpose = whole + 1, f"{purpose}, once more as they are rounded"
    if job.settings.train == "all":
        whole, purpose = whole + 3, f"{purpose}, their gradients and AdamW's two moments"
        instead = "close other programs, or use --train lora, which learns few weights"
    parameters = job.made["results"]["student"]["total_parameters"]
    require_memory(whole * parameters * torch.float32.itemsize, purpose, instead)


def _check_teacher(student: Path, made: dict, source: ModelSource) -> None:
    if made["base_model"]["fingerprint"] != source.fingerprint:
        raise FactorLLMError(
            f"{source.label} is not the dense model that {student} was made from ({made['base_model']['name']}): their "
            "fingerprints differ; give that model as --teacher, for nothing else fits the routers' priors"
        )


def _check_batch(settings: HealSettings, processes: int) -> None:
    at_once = settings.micro_batch * processes
    if settings.batch % at_once:
        raise FactorLLMError(
            f"a batch of {settings.batch} sequences cannot be shared by {processes} processes of "
            f"{settings.micro_batch} sequences at once; use a --batch that is a multiple of {at_once}"
        )


def _read_text(
    work: Workspace,
    source: ModelSource,
    made: dict,
    text: str | None,
    settings: HealSettings,
    made_with: Settings,
    console: Console,
) -> dict[str, Tensor]:
    """Tokens are kept in the workspace, so that a resumed run and all processes see the same ones."""
    path = work.folder / "tokens.safetensors"
    if not path.exists():
        if text is None:
            console.print("no --text given: sampling text from the dense model itself")
        write_shard(path, _pack(source, made, text, settings, made_with, console))
    return load_file(path)


def _pack(
    source: ModelSource, made: dict, text: str | None, settings: HealSettings, made_with: Settings, console: Console
) -> dict[str, Tensor]:
    """Sequences to train on, to validate on, and held out, and whether they are `cut` out of one document.

    On the text that the student was made from, the held-out part is the same, and the calibration part, which the
    student fits already, is trained on only where nothing else is left; it is never validated on.
    """
    length = made_with.length
    parts, held_out, calibrated = _open_parts(source, made, text, made_with)
    validating = sequences_of(settings.validation_tokens, length)
    training = sequences_of(settings.tokens + settings.validation_tokens, length) - validating
    if training < settings.batch:
        raise FactorLLMError(
            f"{training} sequences of {length} tokens to train on are not one batch of {settings.batch}; use more "
            "--tokens or a smaller --batch"
        )
    training -= training % settings.batch  # in whole batches, of which each epoch has all
    validation = parts.hold_out(validating, "validated on, and that the student was not calibrated on")
    fresh = parts.take(training)
    say_notes(parts, console)
    refuse_too_few(len(fresh) + len(calibrated), training, length)
    if (again := training - len(fresh)) > 0:
        console.print(f"{again * length:,} of the tokens to heal on are of the text that the student was calibrated on")
    train = torch.cat([fresh, calibrated])[:training]
    return {"validation": validation, "train": train, "held_out": held_out, "cut": torch.tensor(parts.cut)}


def _open_parts(source: ModelSource, made: dict, text: str | None, made_with: Settings) -> tuple[Parts, Tensor, Tensor]:
    """The text, with its held-out part and the part that the student was calibrated on already handed out.

    The latter has no sequences unless the text is the one that the student was made from.
    """

    def opened(calibrated: int) -> tuple[Parts, Tensor, Tensor]:
        parts = open_text(
            text,
            source.tokenizer(),
            made_with,
            lambda: source.load_model(made_with.compute_dtype, made_with.torch_device),
        )
        return parts, hold_out(parts, made_with), parts.take(calibrated)

    if text is None:
        return opened(0)
    parts, held_out, calibrated = opened(made["data"]["calibration_tokens"] // made_with.length)
    if CalibrationText(calibrated, held_out, "").fingerprint == made["data"]["fingerprint"]:
        return parts, held_out, calibrated
    return opened(0)
