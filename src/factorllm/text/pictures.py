"""A folder of images with captions, as documents of an image and some words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.digest import digest_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

INSTRUCTION = "Describe this image."
"""What a user says of an image."""


@dataclass(frozen=True)
class Picture:
    """An image file, and what its caption says of it; None without one."""

    path: Path
    caption: str | None


def read_pictures(folder: Path) -> list[Picture]:
    """The images of a folder, by name, each once; the caption of NAME.png is NAME.txt.

    Raises:
        FactorLLMError: when it is no folder, holds no images, or a caption cannot be read.
    """
    if not folder.is_dir():
        raise FactorLLMError(f"--images {folder} is no folder; give one that holds {', '.join(SUFFIXES)} files")
    distinct = {digest_of([path]): path for path in reversed(_images(folder))}
    pictures = [Picture(path, _caption(path.with_suffix(".txt"))) for path in sorted(distinct.values())]
    if not pictures:
        raise FactorLLMError(f"--images {folder} holds no image; put {', '.join(SUFFIXES)} files into it")
    if len(pictures) < 2:
        raise FactorLLMError(
            f"--images {folder} holds one image only, which cannot be learned from and measured on; add another"
        )
    return pictures


def pictures_digest(folder: Path) -> str:
    """xxh3-128 of the names and contents of a folder's images and captions, in hexadecimal."""
    files = [one for path in _images(folder) for one in (path, path.with_suffix(".txt")) if one.is_file()]
    return digest_of(files, "\n".join(path.name for path in files).encode(errors="surrogateescape"))


def parted(pictures: list[Picture], seed: int, most_held_out: int) -> tuple[list[Picture], list[Picture]]:
    """Images to learn from, and images that are held out: one in eight, at least one, in random order."""
    shuffled = random.Random(seed).sample(pictures, len(pictures))
    held_out = max(min(len(shuffled) // 8, most_held_out), 1)
    return shuffled[held_out:], shuffled[:held_out]


def words_of(picture: Picture, processor) -> str:
    """What is said round an image, by the processor's chat template if it has a place for images. The image is a
    placeholder."""
    said: str = ""
    if getattr(processor, "chat_template", None):
        asked = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
        turns: list[dict] = [{"role": "user", "content": asked}]
        if picture.caption:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": picture.caption}]})
        said = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not picture.caption)
    return said if processor.image_token in said else f"{processor.image_token}\n{picture.caption or INSTRUCTION}"


def open_picture(path: Path):
    """An image, decoded, in RGB, upright as its camera says: as transformers loads it for its processors.

    Raises:
        FactorLLMError: when it cannot be read, or Pillow is not there.
    """
    image, operations = _pillow()
    try:
        with refusing(f"image {path}", "remove it, or fetch it again"), image.open(path) as opened:
            return operations.exif_transpose(opened).convert("RGB")
    except FactorLLMError as error:
        if not isinstance(error.__cause__, image.DecompressionBombError):
            raise
        raise FactorLLMError(
            f"image {path} has more pixels than Pillow opens, {2 * image.MAX_IMAGE_PIXELS:,}; scale it down, or "
            "remove it"
        ) from None


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise FactorLLMError("--images needs Pillow: pip install 'factorllm[images]'") from error
    return Image, ImageOps


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _caption(path: Path) -> str | None:
    if not path.is_file():
        return None
    with refusing(f"caption {path}", "save it as UTF-8, or remove it"):
        return path.read_text(encoding="utf-8-sig").strip() or None
