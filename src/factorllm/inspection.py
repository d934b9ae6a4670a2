"""Reading back what a finished checkpoint says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from factorllm.errors import FactorLLMError


def read_provenance(folder: Path) -> dict:
    """The content of `factorllm.json`.

    Raises:
        FactorLLMError: when the folder is not a finished checkpoint of factorllm.
    """
    partial = folder.with_name(folder.name + ".partial")
    path = folder / "factorllm.json"
    if not path.exists():
        hint = f"; {partial} is an unfinished run, repeat its command to finish it" if partial.exists() else ""
        raise FactorLLMError(f"{folder} is no checkpoint made by factorllm: it has no factorllm.json{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise FactorLLMError(f"{path} is damaged: it is not JSON; make the checkpoint again") from None
    return content
