"""A model as a GGUF file that llama.cpp can be given: the file itself, or one that is written for the occasion."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from shlex import quote

from factorllm.exporting.gguf_file import Exported, export_gguf
from factorllm.runs.disk import IN_TMPDIR
from factorllm.runs.output import PLAN
from factorllm.student.adapters import refuse_adapters


def as_gguf(model: str, file_type: str, work: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of a model.

    Args:
        model: a `.gguf` file, a folder of `factorllm make`, or a checkpoint or dense model, which is exported.
        file_type: of an exported one.
        work: folder for it.
        say: is told of the export.

    Raises:
        FactorLLMError: when it cannot be exported.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return path
    refuse_adapters(path, "they would be left out here: use factorllm serve")
    if made_last := _named_by_make(path):
        return made_last
    if found := sorted(path.glob(f"{escape(path.resolve().name)}-*.gguf")):
        return found[0]
    made = export_for_now(model, file_type, work, say)
    say(f"exported as {file_type}; `factorllm export {quote(str(model))} -o FILE.gguf` keeps the file")
    return made.path


def _named_by_make(folder: Path) -> Path | None:
    """The GGUF file of a folder of `factorllm make`, as its Modelfile names it: beside it there may be one of an older
    plan, and the folder may have another name by now."""
    with suppress(OSError, UnicodeDecodeError):
        first = (folder / "Modelfile").read_text(encoding="utf-8").partition("\n")[0]
        named = folder / Path(first.removeprefix("FROM ")).name
        if named.suffix == ".gguf" and named.is_file() and (folder / PLAN).is_file():
            return named
    return None


def export_for_now(model: str, file_type: str, work: Path, say: Callable[[str], None]) -> Exported:
    """Export a model, with its adapters if it has some, into a folder that does not stay.

    Raises:
        FactorLLMError: when it cannot be exported.
    """
    say(f"writing {model} as {file_type} into {work}")
    path = work / f"{Path(model).resolve().name}-{file_type}.gguf"
    return export_gguf(model, path, file_type, say=say, when_full=IN_TMPDIR)
