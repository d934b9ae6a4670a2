"""Fingerprints of files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from factorllm.errors import refusing

_BLOCK = 1 << 24


def digest_of(paths: Iterable[Path], start: bytes = b"") -> str:
    """xxh3-128 of `start` and the content of files, in hexadecimal; the files are read in blocks.

    Raises:
        FactorLLMError: for a file that cannot be read.
    """
    digest = xxhash.xxh3_128(start)
    for path in paths:
        _add(digest, path)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, path: Path) -> None:
    with refusing(path, "give another"), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
