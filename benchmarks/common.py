"""What the scripts share: tables in the pages of docs/."""

from __future__ import annotations

import subprocess
from pathlib import Path

from factorllm.runs.workspace import write_text


def replace_part(page: Path, mark: str, content: str) -> None:
    """Write the part of `page` between `<!-- mark -->` and `<!-- /mark -->` anew; without the marks, at its end."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    write_text(page, f"{before}{start}\n{content}{end}{after or chr(10)}")


def commit() -> str:
    """The commit that is checked out, shortened."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
