"""A run, opened and checked: the dense model, the text, the students, and the workspace that it may go on in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.convert.mixing import Mixed, read_mixed
from factorllm.convert.reference import check_against_references
from factorllm.convert.vision import processor_digest, seeing
from factorllm.dense import ModelSource, open_model
from factorllm.dense.families import ffn_width
from factorllm.dense.sequences import Sequences
from factorllm.errors import FactorLLMError
from factorllm.hosts import Host, choose_host
from factorllm.measure.cost import Cost, cost_of
from factorllm.recipe import Recipe, Shape
from factorllm.runs.disk import require_space
from factorllm.runs.identity import common_identity
from factorllm.runs.output import CHECKPOINT, KINDS, check_output, located, trimmed_from
from factorllm.runs.ranks import Ranks
from factorllm.runs.rows import Rows
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import Workspace, finish_publishing, open_checkpoint_job, write_shard
from factorllm.text import CalibrationText, read_calibration_text
from factorllm.text.calibration import public_name
from factorllm.text.kinds import read_text_of_kinds
from factorllm.text.pictures import pictures_digest, read_pictures

_WIDE = 512  # channels
_HELD_OUT = "-held-out"


@dataclass(frozen=True)
class Student:
    """One model that is being made: the factorised one, or the static prune that it is compared with.

    Attributes:
        folder: the unfinished checkpoint.
        kind: of text that it is made for; None for all.
    """

    name: str
    recipe: Recipe
    shape: Shape
    host: Host
    folder: Path
    kind: int | None = None

    def cost(self, dense: PreTrainedConfig) -> Cost:
        """What it holds and runs, in its host."""
        return cost_of(dense, self.shape, head_apart=not self.host.ties_embeddings)


@dataclass(frozen=True)
class Job:
    """Everything that the loop over layers needs, opened and checked.

    Attributes:
        identity: everything that decides the bytes of the result.
        licence: what the dense model states, if it states one.
        text: what is learned from and measured on.
        mixed: sequences with images among those of text, where there are images.
        images: the name of their folder, to publish.
    """

    source: ModelSource
    identity: dict
    licence: str | None
    text: CalibrationText
    mixed: Mixed | None
    images: str | None
    students: list[Student]
    settings: Settings
    work: Workspace
    ranks: Ranks
    console: Console

    @property
    def bears_rounding(self) -> bool:
        """Whether layers may be computed in bfloat16: its rounding is far below what a part of an FFN is off by. What
        keeps every neuron is the dense model, to the last digit; and small products are no faster in it."""
        sparse = all(student.shape.sparsity > 0 for student in self.students)
        return sparse and self.source.config.hidden_size >= _WIDE

    @property
    def kept(self) -> list[Student]:
        """Those that are published: one for each kind of text, or the first alone."""
        return [student for student in self.students if student.kind is not None] or self.students[:1]

    def own(self, student: Student) -> Tensor | None:
        """Which sequences of the calibration are of a student's kind of text, (sequences,), bool; None where it has
        none."""
        return None if student.kind is None else self.text.kinds == student.kind

    @property
    def base_model(self) -> str:
        """The dense model's name, fit to publish; of one that factorllm trimmed, its origin's too."""
        name, origin = public_name(self.source.label), trimmed_from(self.source.label)
        return f"{name} ({origin} with fewer tokens)" if origin else name

    @property
    def layers(self) -> int:
        return self.source.config.num_hidden_layers

    def ffn_entries(self, name: str) -> list[dict]:
        """What was journalled of each layer whose FFN a student has cut, in their order."""
        return [entry for entry in self.work.journal if name in entry["statistics"]]

    def statistics(self, name: str) -> list[dict[str, Any]]:
        """A student's statistics of each layer whose FFN it has cut, with the layer's number."""
        return [{"layer": entry["layer"], **entry["statistics"][name]} for entry in self.ffn_entries(name)]

    @cached_property
    def tensor_names(self) -> list[str]:
        """Names of all tensors of the dense model."""
        return sorted(self.source.parameter_names())

    @property
    def calibration(self) -> Sequences:
        """What is fitted to."""
        return self.mixed.calibration if self.mixed else Sequences(self.text.calibration, {})

    def sequences(self, name: str) -> Sequences:
        """The sequences that the hidden states of `name` are of."""
        return self.mixed.held_out if self.mixed and name.endswith(_HELD_OUT) else self.calibration

    def stream(self, name: str, layer: int) -> Rows:
        """Hidden states of `name` before `layer`, on disk."""
        path = self.work.folder_at("streams") / f"{name}.{layer:04d}.rows"
        sequences, length = self.sequences(name).tokens.shape
        return Rows(path, sequences, length, self.source.config.hidden_size, self.settings.compute_dtype, self.ranks)

    def held_out_name(self, student: Student) -> str:
        """The name of a student's hidden states of held-out sequences; they are there only with images."""
        return student.name + _HELD_OUT

    @property
    def stream_names(self) -> list[str]:
        names = ["teacher", *(student.name for student in self.students)]
        return names + (list(map(self.held_out_name, self.students)) if self.mixed else [])


@contextmanager
def open_job(
    model: str,
    out: str | Path,
    recipes: dict[str, Recipe],
    text: str | None,
    settings: Settings,
    overwrite: bool,
    console: Console | None,
    images: str | None = None,
    kinds: int | None = None,
) -> Iterator[Job | None]:
    """Open and check everything, the cheap checks first; hold the workspace while the block runs.

    Under `accelerate launch` every process gets the same job, and the first one writes. None stands for a job that is
    done: `out` was made by the same one.

    Args:
        kinds: of text that are looked for in `text`; the first students are made for one each.
    """
    out = located(out)
    finish_publishing(out)
    check_output(out, CHECKPOINT, [model, text, images])
    source = open_model(model)
    pictures = None if images is None else Path(images)
    config = source.config
    shapes = {name: recipe.shape(ffn_width(config)) for name, recipe in recipes.items()}
    hosts = _choose_hosts(shapes, settings.host, config)
    wanted, settings = settings.dtype, settings.resolve(config)
    ties = _ties_in_half(settings, hosts)
    if ties and wanted != "auto":
        raise FactorLLMError(f"{ties}; use --dtype float32")
    ranks = Ranks(settings)
    settings = settings.model_copy(update={"device": str(ranks.device)} | ({"dtype": "float32"} if ties else {}))
    console = ranks.console(console)
    tokenizer = source.tokenizer()
    source.generation_config()  # needed at the end only, but a damaged one must be refused before the work
    console.print(f"reading {source.label}", markup=False)
    if source.note:
        console.print(source.note, highlight=False, markup=False, soft_wrap=True)
    if ties:
        console.print(f"{ties}: it is written in float32", highlight=False, markup=False, soft_wrap=True)
    identity = _identity(source, recipes, text, settings, pictures, kinds)
    with open_checkpoint_job(out, identity, overwrite, ranks) as work:
        if work is None:
            yield None
            return
        students = [
            _student(name, recipe, shapes[name], hosts[name], work, kind if kind < (kinds or 0) else None)
            for kind, (name, recipe) in enumerate(recipes.items())
        ]
        with ranks.main_first():
            read_text = partial(_read_text, work, source, tokenizer, text, console, kinds)
            if pictures is None:
                calibration, mixed = read_text(settings), None
            else:
                calibration, mixed = read_mixed(work, source, tokenizer, pictures, settings, read_text, console)
        job = Job(
            source, identity, source.licence, calibration, mixed, images and public_name(images), students,
            settings, work, ranks, console,
        )  # fmt: skip
        _check_disk(job)
        with ranks.main_first():
            if ranks.is_main and not work.layers_done:
                check_against_references(source, tokenizer, settings.length, ranks.device, console)
        yield job


def _identity(
    source: ModelSource,
    recipes: dict[str, Recipe],
    text: str | None,
    settings: Settings,
    pictures: Path | None,
    kinds: int | None,
) -> dict:
    """Everything that decides the bytes of the result.

    Raises:
        FactorLLMError: when the text, or the folder of images, cannot be used, or the model reads no images.
    """
    identity = {
        "recipes": {name: recipe.model_dump() for name, recipe in recipes.items()},
        "model": source.fingerprint,
        "files beside the weights": source.surroundings,
        **common_identity(text, settings),
    }
    if pictures:
        seeing(source)
        read_pictures(pictures)
        identity |= {"images": pictures_digest(pictures), "processor": processor_digest(source)}
    if kinds:
        identity |= {"kinds": kinds}
    return identity


def _student(name: str, recipe: Recipe, shape: Shape, host: Host, work: Workspace, kind: int | None) -> Student:
    if kind is None:
        return Student(name, recipe, shape, host, work.folder_at(name))
    folder = work.folder_at("student") / KINDS / str(kind)
    folder.mkdir(parents=True, exist_ok=True)
    return Student(name, recipe, shape, host, folder, kind)


def _choose_hosts(shapes: dict[str, Shape], wanted: str, config: PreTrainedConfig) -> dict[str, Host]:
    """The user's choice of host is for the student; the models that it is compared with take what fits them."""
    return {
        name: choose_host(wanted if name.startswith("student") else "auto", config, shape)
        for name, shape in shapes.items()
    }


def _ties_in_half(settings: Settings, hosts: dict[str, Host]) -> str | None:
    """Why a student cannot be written in the dtype of `settings`, or None."""
    for host in hosts.values():
        if host.ties_in_half and settings.dtype != "float32":
            return f"in {settings.dtype} the gate weights of {host.name} are all the same, so any experts would run"
    return None


def _read_text(
    work: Workspace,
    source: ModelSource,
    tokenizer,
    text: str | None,
    console: Console,
    kinds: int | None,
    settings: Settings,
) -> CalibrationText:
    """Tokens are kept in the workspace, so that a resumed run and all processes see the same ones."""
    path = work.folder / "tokens.safetensors"
    if path.exists():
        return CalibrationText.from_tensors(load_file(path), text)
    if text is None:
        console.print("no --text given: sampling calibration text from the model itself")
    if kinds:
        read = read_text_of_kinds(text, tokenizer, settings, kinds, console)
    else:
        read = read_calibration_text(
            text,
            tokenizer,
            settings,
            load_model=lambda: source.load_model(settings.compute_dtype, settings.torch_device),
            console=console,
        )
    write_shard(path, read.tensors())
    return read


def _check_disk(job: Job) -> None:
    """Refuse before the work when the disk is plainly too small."""
    config = job.source.config
    stored = job.settings.stored_dtype.itemsize
    weights = sum(student.cost(config).total_parameters * stored for student in job.students)
    streams = (
        2
        * sum(job.sequences(name).tokens.numel() for name in job.stream_names)
        * config.hidden_size
        * job.settings.compute_dtype.itemsize
    )
    if job.work.layers_done == 0:
        instead = "free some, choose another output folder, or use fewer --tokens"
        require_space(job.work.out, weights + streams, instead)
