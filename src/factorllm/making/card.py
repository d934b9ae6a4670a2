"""What is said of a made model: the numbers that count, its card, and how to use it."""

from __future__ import annotations

import re
import shlex

from factorllm.dense.safetensors import licence_of_card
from factorllm.making.place import Place
from factorllm.report.card import model_card
from factorllm.runs.workspace import write_text
from factorllm.student.read import read_provenance


def numbers(at: Place) -> list[tuple[str, str]]:
    """How fast, how much is kept, how large: each with what it is. What was not timed is left out."""
    found = at.measured().numbers()
    if at.plan.bench is None:
        found.append((f"{at.gguf.stat().st_size / 2**20:.0f} MiB", "in the file"))
    return found


def write_card(at: Place) -> None:
    """`README.md` of the folder: the model card of its checkpoint, with the numbers and how to use it."""
    card = model_card(at.out.name, read_provenance(at.checkpoint), licence_of_card(at.checkpoint / "README.md"))
    said = "\n".join(f"- **{value}** {what}" for value, what in numbers(at))
    used = "\n".join(commands(at))
    write_text(at.out / "README.md", f"{card}\n## In short\n\n{said}\n\n## Use it\n\n```sh\n{used}\n```\n")


def commands(at: Place) -> list[str]:
    """How to chat, serve and evaluate, as a shell takes it."""
    called = re.sub(r"[^a-z0-9._-]+", "-", at.out.name.lower()).strip("-.") or "made"  # what Ollama takes as a name
    used = [
        ["factorllm", "chat", at.out],
        ["factorllm", "serve", at.gguf],
        ["factorllm", "eval", at.checkpoint, "--against", at.dense],
        ["ollama", "create", called, "-f", at.out / "Modelfile"],
    ]
    return [shlex.join(map(str, words)) for words in used]
