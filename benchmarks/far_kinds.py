"""Write documents of four kinds that are far apart, novels, a manual in Spanish, Python source and changelogs: one text
to make models of, shuffled, and unseen documents of each kind.

    apt-get download r-cran-janeaustenr debian-handbook
    for package in *.deb; do dpkg -x $package debian; done
    python benchmarks/code_text.py --bytes 40000000 -o code.jsonl
    python benchmarks/far_kinds.py --debian debian --code code.jsonl -o texts

Changelogs are those of the packages installed here. A novel, a page, a file or a package is on one side only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterable
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

from common import in_one_line
from mixed_text import AUSTEN, novels, pages

from factorllm.runs.workspace import write_text
from factorllm.text.documents import Documents

PAGE, SHORTEST = 2000, 1500
"""Characters of a document: what is longer is cut, what is shorter left out."""

MADE_FROM, UNSEEN = 160, 40
"""Documents of a kind."""

INSTALLED = Path("/usr/share/doc")
HANDBOOK = "usr/share/doc/debian-handbook/html/es-ES"
CODE_FILES = 600
ONE_EACH = ("python", "changelogs")
"""Kinds of which each source gives one document, so that no long one is a kind of its own."""


class Prose(HTMLParser):
    """The text of a page, without menus and commands."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._left_out = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "head", "pre"):
            self._left_out += 1
        if tag in ("p", "li", "h1", "h2", "h3", "tr"):
            self.found.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "head", "pre"):
            self._left_out -= 1

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self.found.append(data)


def handbook_page(path: Path) -> str:
    prose = Prose()
    prose.feed(path.read_text(encoding="utf-8", errors="ignore"))
    lines = (" ".join(line.split()) for line in "".join(prose.found).split("\n"))
    return "\n".join(line for line in lines if len(line) > 60)


def changelogs() -> list[str]:
    """The longest of each package. Packages that were built of one source have the same one, which is taken once."""
    longest: dict[Path, str] = {}
    for path in sorted(INSTALLED.rglob("changelog*.gz")):
        if path.is_file() and not path.is_symlink():
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
            longest[path.parent] = max(longest.get(path.parent, ""), text, key=len)
    return list({text[:PAGE]: text for text in longest.values()}.values())


def documents_of(kind: str, sources: list[str], chooser: random.Random) -> list[str]:
    """Shuffled documents of some novels, pages, files or packages."""
    if kind in ONE_EACH:
        return [page for source in sources for page in islice(pages([source], PAGE, SHORTEST), 1)]
    found = list(pages(sources, PAGE, SHORTEST))
    chooser.shuffle(found)
    return found


def write(path: Path, documents: Iterable[str]) -> None:
    write_text(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="folder that the packages were unpacked into")
    parser.add_argument("--code", required=True, help="file that code_text.py wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    kinds = {
        "novels": list(novels(options.debian / AUSTEN)),
        "spanish": [handbook_page(path) for path in sorted((options.debian / HANDBOOK).glob("*.html"))],
        "python": list(islice(Documents(options.code), CODE_FILES)),
        "changelogs": changelogs(),
    }
    chooser, together = random.Random(3), []
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, sources in kinds.items():
        sources = [source for source in sources if len(source) > SHORTEST]
        chooser.shuffle(sources)
        apart = max(len(sources) // 4, 1)
        made_from = documents_of(kind, sources[apart:], chooser)
        together += made_from[:MADE_FROM]
        write(options.out / f"{kind}.jsonl", documents_of(kind, sources[:apart], chooser)[:UNSEEN])
    chooser.shuffle(together)
    write(options.out / "all.jsonl", together)


if __name__ == "__main__":
    main()
