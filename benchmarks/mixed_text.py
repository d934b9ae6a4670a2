"""Write a mixed text to calibrate and heal on: Wikipedia introductions, novels, manuals, dictionaries and, with
`--sampled`, text that the dense model said by itself, in the place of half of the manuals and dictionaries.

    apt-get download dict-foldoc dict-gcide python3.11-doc perl-doc r-cran-janeaustenr
    for package in *.deb; do dpkg -x $package debian; done
    python benchmarks/mixed_text.py --debian debian --characters 2400000 --out mixed.jsonl

Documents are shuffled by a fixed seed, so the file is the same wherever it is made.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import in_one_line

from factorllm.demo import demo_text
from factorllm.text.documents import Documents

PAGE, SHORTEST = 4000, 200
"""Characters of a page: long manuals are cut into pages, so that one of them is not a whole domain; what is shorter is
left out."""


AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def pages(texts: Iterable[str], size: int = PAGE, shortest: int = SHORTEST) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), size):
            if len(page := text[start : start + size].strip()) > shortest:
                yield page


def dictionary(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as file:
        yield file.read()


def manuals(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern)):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="ignore")


def novels(path: Path) -> Iterator[str]:
    """The character vectors of an R package's lazy-load file, each a novel by lines, as paragraphs without breaks."""
    content = path.read_bytes()
    while content:
        chunk = zlib.decompressobj()
        # A big-endian size, then a zlib stream; in it a header with the name of the encoding, and counted strings.
        serialised = chunk.decompress(content[4:])
        yield re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(_strings(serialised)))
        content = chunk.unused_data


def _strings(serialised: bytes) -> Iterator[str]:
    at = 14 + 4 + struct.unpack_from(">i", serialised, 14)[0] + 8
    while at < len(serialised):
        size = max(struct.unpack_from(">i", serialised, at + 4)[0], 0)
        yield serialised[at + 8 : at + 8 + size].decode("utf-8")
        at += 8 + size


def choose(documents: Iterator[str], characters: int, chooser: random.Random) -> list[str]:
    """Random documents of about the given number of characters in all."""
    candidates = list(documents)
    chooser.shuffle(candidates)
    chosen, size = [], 0
    for document in candidates:
        if size >= characters:
            break
        chosen.append(document)
        size += len(document)
    return chosen


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="folder that the packages were unpacked into")
    parser.add_argument("--characters", type=int, default=2_400_000)
    parser.add_argument("--sampled", type=Path, help="file that `factorllm sample` wrote")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    chooser, share = random.Random(0), arguments.characters // 10
    small = share / 2 if arguments.sampled else share
    dictionaries = arguments.debian / "usr/share/dictd"
    sources = {
        "wikipedia": (Documents(demo_text()), 3 * share),
        "novels": (pages(novels(arguments.debian / AUSTEN)), 3 * share),
        "foldoc": (pages(dictionary(dictionaries / "foldoc.dict.dz")), small),
        "gcide": (pages(dictionary(dictionaries / "gcide.dict.dz")), small),
        "python": (pages(manuals(arguments.debian, "*.rst.txt")), small),
        "perl": (pages(manuals(arguments.debian, "*.pod")), small),
    }
    if arguments.sampled:
        sources["sampled"] = (Documents(str(arguments.sampled)), 2 * share)
    with arguments.out.open("w", encoding="utf-8") as file:
        for name, (documents, characters) in sources.items():
            for text in choose(documents, characters, chooser):
                file.write(json.dumps({"source": name, "text": text}) + "\n")


if __name__ == "__main__":
    main()
