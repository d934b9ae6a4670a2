"""What the scripts share: tables in the pages of docs/, unseen documents as tokens, and how a refusal is told."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from factorllm.dense.opening import opened
from factorllm.errors import FactorLLMError, one_line
from factorllm.runs.workspace import write_text
from factorllm.text.documents import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def in_one_line(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` that tells a refusal of factorllm as its commands do, on stderr and without a traceback."""

    @wraps(main)
    def told() -> None:
        try:
            main()
        except FactorLLMError as error:
            raise SystemExit(f"error: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            raise SystemExit(f"error: {one_line(error)}") from None

    return told


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


def document_starts(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, shortest: int, longest: int
) -> list[list[int]]:
    """The first tokens of the first documents of a text that are long enough.

    Args:
        count: documents at most.
        shortest, longest: tokens of each.
    """
    encoded = (opened(tokenizer, document) for document in Documents(text))
    found = list(itertools.islice((tokens[:longest] for tokens in encoded if len(tokens) >= shortest), count))
    if not found:
        raise SystemExit(f"{text} has no document of {shortest} tokens; leave it out, or take longer ones")
    return found
