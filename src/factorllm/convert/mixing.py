"""What a model is calibrated on: text, and where it is asked for sequences that begin with an image, spread among those
of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from factorllm.convert.vision import Document, Front, Reader
from factorllm.dense import ModelSource
from factorllm.dense.opening import opening_of
from factorllm.dense.sequences import Sequences
from factorllm.errors import FactorLLMError
from factorllm.runs.progress import Meter, meter
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import Workspace, write_shard
from factorllm.text import CalibrationText
from factorllm.text.parts import sequences_of
from factorllm.text.pictures import Picture, parted, read_pictures

_PARTS = ("calibration", "held_out")
_FILE = "sequences.safetensors"


@dataclass(frozen=True)
class Mixed:
    """Sequences of text and of images.

    Attributes:
        calibration: what is fitted to.
        held_out: what the error of each kind of token is measured on.
    """

    calibration: Sequences
    held_out: Sequences

    def counts(self) -> dict[str, int]:
        """Images and tokens of each part and kind."""
        found = {}
        for name in _PARTS:
            sequences: Sequences = getattr(self, name)
            tokens = int(sequences.is_image(slice(0, len(sequences))).sum())
            found |= {
                f"{name}_images": len(sequences.files),
                f"{name}_image_tokens": tokens,
                f"{name}_text_tokens": sequences.tokens.numel() - tokens,
            }
        return found


def read_mixed(
    work: Workspace,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    images: Path,
    settings: Settings,
    read_text: Callable[[Settings], CalibrationText],
    console: Console,
) -> tuple[CalibrationText, Mixed]:
    """Sequences with the images of a folder, in at most half of `settings.tokens`, and with text in the rest.

    What the vision tower makes of the images is kept in the workspace, so that a resumed run and all processes read it.

    Args:
        read_text: reads the text for other settings.

    Raises:
        FactorLLMError: when the model reads no images, or one of them or the folder cannot be used.
    """
    path = work.folder / _FILE
    if not path.exists():
        reader = Reader(source, tokenizer)
        plan = _plan(source, reader, images, settings, console)
        text = read_text(settings.model_copy(update={"tokens": plan.text_tokens(settings.length)}))
        opening = torch.tensor(opening_of(tokenizer), dtype=torch.int64)
        write_shard(path, _look(work, source, reader, plan, text, opening, settings, console))
    # Kept by now: the settings decide nothing any more.
    tensors = load_file(path)
    return read_text(settings), Mixed(*(_sequences(work, tensors, name) for name in _PARTS))


@dataclass(frozen=True)
class _Plan:
    """Documents of images, and how many sequences of what length they are mixed into."""

    calibration: list[Document]
    held_out: list[Document]
    sequences: int
    length: int

    def text_tokens(self, length: int) -> int:
        """Tokens of text that fill the calibration up: whole sequences of the length that the text is packed in."""
        missing = self.sequences * self.length - sum(len(document.tokens) for document in self.calibration)
        return -(-missing // length) * length


def _plan(source: ModelSource, reader: Reader, images: Path, settings: Settings, console: Console) -> _Plan:
    learned, held_out = parted(
        read_pictures(images), settings.seed, sequences_of(settings.held_out_tokens, settings.length) // 2
    )
    # Half of the sequences at most: more documents than that are not read.
    learned = learned[: max(sequences_of(settings.tokens, settings.length) // 2, 1)]
    with meter(console, "reading images", len(learned) + len(held_out)) as bar:
        documents = {
            name: _documents(reader, part, bar) for name, part in zip(_PARTS, (learned, held_out), strict=True)
        }
    longest = max((one for part in documents.values() for one in part), key=lambda one: len(one.tokens))
    length = max(settings.length, len(longest.tokens))
    if length > source.config.max_position_embeddings:
        raise FactorLLMError(
            f"image {longest.picture.path} and its words are {length:,} tokens, and {source.label} reads sequences of "
            f"{source.config.max_position_embeddings:,}; make the image smaller, or leave it out"
        )
    sequences = max(settings.tokens // length, 2)
    used = documents["calibration"][: sequences // 2]
    console.print(
        f"{len(used):,} images to learn from and {len(held_out):,} held out, in {sequences:,} sequences of {length:,} "
        "tokens",
        highlight=False,
    )
    return _Plan(used, documents["held_out"], sequences, length)


def _documents(reader: Reader, pictures: list[Picture], bar: Meter) -> list[Document]:
    found = []
    for picture in pictures:
        # Pixels of all images at once would not fit in memory.
        found.append(replace(reader.document(picture), inputs={}))
        bar.advance(1)
    return found


def _look(
    work: Workspace,
    source: ModelSource,
    reader: Reader,
    plan: _Plan,
    text: CalibrationText,
    opening: Tensor,
    settings: Settings,
    console: Console,
) -> dict[str, Tensor]:
    """Run the vision tower on all images, and say which sequences they are in.

    Args:
        opening: what sequences of text begin with.
    """
    front = Front(source, plan.length, settings.compute_dtype, settings.torch_device)
    # In a text, an image's token would want an image.
    parts = (part[:, len(opening) :] for part in (text.calibration, text.held_out))
    learned, held_out = (part[part != reader.image_token] for part in parts)
    fill = {"calibration": learned, "held_out": held_out.repeat(-(-plan.length // len(held_out)) + 1)}
    count = {"calibration": plan.sequences, "held_out": 2 * len(plan.held_out)}
    tensors: dict[str, Tensor] = {}
    with meter(console, "looking at images", len(plan.calibration) + len(plan.held_out)) as bar:
        for name in _PARTS:
            documents: list[Document] = getattr(plan, name)
            places = [(2 * number + 1) * count[name] // (2 * len(documents)) for number in range(len(documents))]
            begun = dict(zip(places, documents, strict=True))
            tokens = _filled(begun, count[name], plan.length, fill[name], opening)
            for number, document in begun.items():
                front.write(reader.document(document.picture), tokens[number], _file(work, name, number))
                bar.advance(1)
            tensors |= {name: tokens, f"{name}_images": torch.tensor(places)}
            first = reader.document(documents[0].picture)
            front.check(first, _sequences(work, tensors, name), places[0])
    return tensors


def _filled(begun: dict[int, Document], count: int, length: int, text: Tensor, opening: Tensor) -> Tensor:
    """Sequences of which some begin with a document, and which text fills, as often as it takes: (count, length)."""
    rows, used = [], 0
    for number in range(count):
        start = begun[number].tokens if number in begun else opening
        missing = length - len(start)
        if used + missing > len(text):
            used = 0
        rows.append(torch.cat([start, text[used : used + missing]]))
        used += missing
    return torch.stack(rows)


def _sequences(work: Workspace, tensors: dict[str, Tensor], name: str) -> Sequences:
    places = tensors[f"{name}_images"].tolist()
    return Sequences(tensors[name], {number: _file(work, name, number) for number in places})


def _file(work: Workspace, part: str, number: int) -> Path:
    return work.folder_at("images") / f"{part}.{number:05d}.safetensors"
