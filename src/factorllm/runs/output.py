"""Where a command writes: what may be replaced there, whether anything can be written, and where unfinished work is.

All of it is asked before the work. Only what factorllm made is ever replaced, and never an input of the same command.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote

from factorllm.errors import FactorLLMError, check_utf8, refusing
from factorllm.runs.disk import explain_full_disk, nearest_existing
from factorllm.runs.given import given

PROVENANCE = "factorllm.json"
"""What a checkpoint says of itself, in its folder."""

INSIDE = ".partial"
"""The folder of the unfinished run in an output folder that was there before."""

TRIMMED_FROM = "factorllm.vocabulary.json"
"""What a trimmed model says of itself, in its folder."""

JOB = "job.json"
"""What a workspace says that it is for."""

PROCESSOR_TEMPLATE = "chat_template.json"
"""The chat template of a processor, as older models that take images have it, and their tokenizers not."""

_FILES = (
    "README.md", "config.json", "generation_config.json", PROVENANCE, "factorllm.run.json",
    "factorllm.partition.json", TRIMMED_FROM, "model.safetensors", "model.safetensors.index.json",
    "model-[0-9]*-of-[0-9]*.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    PROCESSOR_TEMPLATE, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "intuition.json",
)  # fmt: skip
_TELLING = ("README.md", "factorllm.run.json")
TEMPLATES = "additional_chat_templates"
"""The folder of the chat templates that have names."""

_FOLDERS = {
    "adapters": ("adapter_config.json", "adapter_model.safetensors"),
    "report": ("index.html", "*.png"),
    "runs": ("events.out.tfevents*",),
    TEMPLATES: ("*.jinja",),
}
PLAN = "plan.yaml"
"""What `make` was to do, in its folder."""

MADE = "checkpoint"
"""The folder of the student in what `make` wrote."""

KINDS = "kinds"
"""The folder of a checkpoint for each kind of text, in which they have numbers."""

_FOLDERS[KINDS] = (*_FILES, *(pattern for patterns in _FOLDERS.values() for pattern in patterns))


@dataclass(frozen=True)
class Kind:
    """A kind of output.

    Attributes:
        what: the output, as messages call it.
        is_folder: whether it is a folder.
        read: what factorllm wrote into an output of this kind, the job that made it under `job`; None for anything
            that it did not make.
        foreign: the first file in an output that factorllm did not put there.
    """

    what: str
    is_folder: bool
    read: Callable[[Path], dict | None]
    foreign: Callable[[Path], str | None] = lambda out: None


def located(path: str | Path) -> Path:
    """The absolute path that an output is at, symlinks followed: what is written, and what may be lost there.

    Raises:
        FactorLLMError: for an empty path, which as a path would be the current folder, and for what no path can be.
    """
    path = given(path)
    if not path:
        raise FactorLLMError("the output's path is empty; say where to write with -o, . for the current folder")
    with refusing(path, "it is no path that can be there: choose a shorter name"):
        found = Path(os.path.realpath(path))
        found.exists()
    return found


def workspace_folder(out: Path) -> Path:
    """The folder of the unfinished run that will become `out`: beside it, or in it where `out` is there already.

    A folder that is there may be what cannot be renamed or replaced: a mount point, the folder that the user's shell is
    in, one in a folder that is not the user's.
    """
    out = located(out)
    beside = out.parent / f"{out.name}.partial"
    if not os.path.isdir(out) or ((beside / JOB).exists() and beside.stat().st_dev == out.stat().st_dev):
        return beside
    return out / INSIDE


def is_free(out: Path) -> bool:
    """Whether nothing is at `out`: nothing, an empty file, or a folder that holds only an unfinished run of ours."""
    if os.path.isdir(out):
        return all(path.name == INSIDE for path in out.iterdir())
    return not os.path.lexists(out) or (os.path.isfile(out) and os.path.getsize(out) == 0)


def check_output(out: Path, kind: Kind, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse what must not be replaced, or cannot be written.

    Args:
        out: of `located`.
        inputs: paths that the command reads; what is no local path is left out.

    Raises:
        FactorLLMError: when an input would be lost, `out` is something that factorllm did not make, or nothing can be
            written there.
    """
    check_utf8(out, "choose a name in UTF-8, for some libraries write no other files")
    _check_inputs(out, inputs)
    with refusing(out, "choose another -o"):
        free = is_free(out)
    if not free or (os.path.lexists(out) and os.path.isdir(out) != kind.is_folder):
        _check_replaceable(out, kind)
    if os.path.isfile(out) and _is_mount(out):
        raise FactorLLMError(f"{out} is a mount point, so it cannot be replaced; choose a file in a mounted folder")
    _check_writable(out)


def is_done(out: Path, kind: Kind, job: dict) -> bool:
    """Whether `out` is there, and was made by the same job.

    Raises:
        FactorLLMError: when it was made by another one; says what differs.
    """
    if is_free(out):
        return False
    before = (kind.read(out) or {}).get("job")
    if isinstance(before, dict):
        changed = first_difference(before, job)
        if changed is None and (not kind.is_folder or (out / "config.json").exists() or (out / KINDS).is_dir()):
            return True
        reason = f", made with {changed}" if changed else ", but parts of it are gone"
    else:
        reason = ", and does not say which command made it"
    raise FactorLLMError(
        f"{out} exists already{reason}; choose another output folder, or add --overwrite to replace it"
    )


def first_difference(before: dict, now: dict) -> str | None:
    """The first value that differs between two jobs, in words; None when they are equal."""
    old, new = _leaves(before), _leaves(json.loads(json.dumps(now)))
    for key in old | new:
        if old.get(key) != new.get(key):
            return f"other {key} ({old.get(key)}, now {new.get(key)})"
    return None


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _check_inputs(out: Path, inputs: Iterable[str | Path | None]) -> None:
    for path in inputs:
        for place in _places(path):
            for written in (out, workspace_folder(out)):
                if _holds(written, place):
                    raise FactorLLMError(
                        f"{written} is or holds {path}, which this command reads, so it is not written to; choose "
                        "another -o"
                    )


def _places(path: str | Path | None) -> set[Path]:
    """Where an input lies: by its own name, behind symlinks, and its files where they lie elsewhere."""
    if path is None or not os.path.exists(os.path.expanduser(path)):
        return set()
    path = Path(os.path.abspath(os.path.expanduser(path)))
    places = {path, Path(os.path.realpath(path))}
    with suppress(OSError):  # who reads the input says what is wrong with it
        places |= {Path(os.path.realpath(entry)) for entry in path.iterdir()}
    return places


def _holds(folder: Path, place: Path) -> bool:
    """Whether a path is, or is in, what is at `folder`; by identity, for one folder may have many names."""
    if not os.path.exists(folder):
        return False
    return any(os.path.samefile(folder, above) for above in (place, *place.parents) if above.exists())


def _check_replaceable(out: Path, kind: Kind) -> None:
    if not (os.path.isdir(out) if kind.is_folder else os.path.isfile(out)):
        found = "a folder" if out.is_dir() else "a file" if out.is_file() else "no ordinary file"
        wanted = "a folder" if kind.is_folder else "a file"
        raise FactorLLMError(f"{out} is {found}, and -o is {wanted} to write; choose another")
    if kind.read(out) is None:
        raise FactorLLMError(
            f"{out} exists already and is not {kind.what}, so it is never replaced; choose another -o, or move it away"
        )
    if foreign := kind.foreign(out):
        raise FactorLLMError(
            f"{out} holds {foreign}, which factorllm did not put there and will not remove; move it away, or choose "
            "another -o"
        )


def _check_writable(out: Path) -> None:
    """Try it: no look at permissions knows of read-only mounts, quotas and file systems of the network."""
    folder = nearest_existing(out if os.path.isdir(out) else out.parent)
    if not folder.is_dir():
        raise FactorLLMError(f"{out} cannot be written: {folder} is a file; choose another -o")
    parts = [] if os.path.isdir(out) else out.relative_to(folder).parts
    longest = os.pathconf(folder, "PC_NAME_MAX") - len(".partial")
    if any(len(os.fsencode(part)) > longest for part in parts):
        raise FactorLLMError(f"the name of {out} is too long: {longest} bytes are left for it; choose a shorter one")
    with explain_full_disk(out, "free some, or choose another -o"), refusing(out, "choose another -o"):
        tempfile.TemporaryFile(dir=folder).close()


def _is_mount(path: Path) -> bool:
    """Whether something is mounted there; what is bound from the same file system is in the system's list only."""
    mounts = Path("/proc/self/mountinfo")
    if path.is_mount() or not mounts.exists():
        return path.is_mount()
    points = (line.split()[4] for line in mounts.read_bytes().splitlines())
    return os.fsencode(path) in {point.decode("unicode_escape").encode("latin-1") for point in points}


def read_json(path: Path) -> dict | None:
    """The mapping in a JSON file; None where there is no such file, or it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_checkpoint(out: Path) -> dict | None:
    made = read_json(out / PROVENANCE)
    return made if made is not None and {"format", "recipe", "base_model", "results"} <= made.keys() else None


def _foreign_file(out: Path) -> str | None:
    for path in sorted(out.iterdir()):
        if path.is_dir() and is_own(path):
            files = (file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir())
            odd = next((file for file in files if not _matches(file, _FOLDERS[path.name])), None)
            if odd:
                return str(odd.relative_to(out))
        elif path.name != INSIDE and not is_own(path):
            return path.name
    return None


def refuse_folder_of_checkpoints(folder: Path) -> None:
    """Refuse a folder that holds checkpoints, as `make` writes it and `factorize` for each kind of text, where one
    model is wanted.

    Raises:
        FactorLLMError: naming one of them.
    """
    if (folder / PLAN).is_file() and (folder / MADE / "config.json").is_file():
        raise FactorLLMError(f"{folder} is what `factorllm make` wrote; the checkpoint in it is {folder / MADE}")
    if (folder / KINDS).is_dir() and (folder / PROVENANCE).is_file() and not (folder / "config.json").exists():
        raise FactorLLMError(
            f"{folder} holds a model for each kind of text, each a checkpoint of its own; give one of them, such as "
            f"{folder / KINDS / '0'} (`factorllm serve {quote(str(folder))}` serves all)"
        )


def own_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint beside its weights: what factorllm put there, and nothing of the user's."""
    files = (path for path in sorted(checkpoint.iterdir()) if path.is_file() and _matches(path, _FILES))
    return [path for path in files if ".safetensors" not in path.name]


def companions(checkpoint: Path) -> list[Path]:
    """The files beside a checkpoint's weights that decide what is made of it: tokenizer, chat templates, configs. A
    card does not, nor does what a run took."""
    templates = sorted((checkpoint / TEMPLATES).glob("*.jinja"))
    return [path for path in own_files(checkpoint) if path.name not in _TELLING] + templates


def is_own(path: Path) -> bool:
    """Whether a file or folder of a checkpoint is, by its name, one that factorllm puts there."""
    if path.is_symlink():
        return False
    return path.name in _FOLDERS if path.is_dir() else _matches(path, _FILES)


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


CHECKPOINT = Kind("a checkpoint that factorllm made", True, _read_checkpoint, _foreign_file)


def _read_trimmed(out: Path) -> dict | None:
    made = read_json(out / TRIMMED_FROM) or {}
    base = made.get("base_model")
    whole = {"format", "kept"} <= made.keys() and isinstance(base, dict) and isinstance(base.get("name"), str)
    return made if whole else None


def trimmed_from(model: str | Path) -> str | None:
    """The published name of what a model was trimmed from; None for one that factorllm did not trim."""
    made = _read_trimmed(Path(os.path.expanduser(model)))
    # Half a character, which JSON can hold, could not be written into a card.
    return made["base_model"]["name"].encode(errors="replace").decode() if made else None


TRIMMED = Kind("a model that factorllm trimmed", True, _read_trimmed, _foreign_file)


def check_own_files(folder: Path, names: Iterable[str], is_ours: Callable[[Path], bool]) -> None:
    """Refuse a folder in which files of these names are the user's; its other files are not touched.

    Args:
        folder: of `located`.
        is_ours: whether the files of these names in a folder are factorllm's.

    Raises:
        FactorLLMError: naming the file, or saying why nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise FactorLLMError(f"{folder} is a file, and a folder is written to; choose another -o")
    there = [name for name in names if os.path.lexists(folder / name)]
    odd = [name for name in there if not is_ours(folder) or (folder / name).is_symlink()]
    if odd:
        raise FactorLLMError(
            f"{folder / odd[0]} exists already and was not made by factorllm, so it is not replaced; choose another -o"
        )
    _check_writable(folder)
