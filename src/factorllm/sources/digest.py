"""Fingerprints of files."""

from __future__ import annotations

from pathlib import Path

import xxhash

_BLOCK = 1 << 24


def add_file(digest: xxhash.xxh3_128, path: Path) -> None:
    """Add the content of a file to a digest, in blocks."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
