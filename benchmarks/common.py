"""What the scripts share: reading the text that `factorize` would read, and tables in the pages of docs/."""

from __future__ import annotations

import subprocess
from pathlib import Path

from factorllm.checkpoint import write_text
from factorllm.settings import Settings
from factorllm.sources import CalibrationText, ModelSource, read_calibration_text


def read_text(source: ModelSource, text: str, settings: Settings) -> CalibrationText:
    """The calibration and held-out tokens that `factorize` takes from a text under these settings."""
    return read_calibration_text(
        text,
        source.tokenizer(),
        tokens=settings.tokens,
        held_out_tokens=settings.held_out_tokens,
        length=settings.length,
        seed=settings.seed,
        load_model=lambda: None,
    )


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
