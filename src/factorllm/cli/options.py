"""Options of the commands: those that several share, and those that are the fields of a command's settings."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from factorllm.errors import FactorLLMError


def _path(text: str) -> Path:
    if not text:
        raise FactorLLMError("a path on the command line is empty; give one, . for the current folder")
    return Path(os.path.expanduser(text))


IS_PATH = {"parser": _path, "metavar": "PATH"}

Model = Annotated[str, typer.Argument(help="Hub id, folder of safetensors, or .gguf file.")]
Made = Annotated[Path, typer.Argument(help="A checkpoint that factorllm made.", **IS_PATH)]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write the checkpoint to.", **IS_PATH)]
Text = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: .txt, .jsonl, .json, .parquet or a dataset id. Default: sample from the model."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images, NAME.png with a caption in NAME.txt, to calibrate a vision-language model on as well.",
        **IS_PATH,
    ),
]
FileType = Annotated[
    str,
    typer.Option(
        "--type",
        help="f32, f16, bf16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl, iq4_xs or q3_k.",
    ),
]
MemoryLimit = Annotated[
    float, typer.Option(help="GiB that one kind of a layer's activations may take before it spills to disk.")
]
Speed = Annotated[
    float | None, typer.Option(help="Decode so many times as fast as the dense model in the same file type.")
]
Keep = Annotated[float | None, typer.Option(help="Share of the dense model's scores to keep, as far as it is known.")]
Vocabulary = Annotated[
    int | None, typer.Option(help="Tokens of the vocabulary that stay, as by factorllm trim; all unless said.")
]
Time = Annotated[str | None, typer.Option(help="Time for all of it: 90s, 60m or 2h.", metavar="TIME")]
Memory = Annotated[
    str | None, typer.Option(help="Memory for the file and a conversation: 800m or 16g.", metavar="MEMORY")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--overwrite",
        help="Go on with an unfinished run and refuse an output that exists, or replace what factorllm made there.",
    ),
]


_MOST_GIB = 2.0**31  # more than the settings take, which refuse it


def in_bytes(gib: float) -> float:
    """A memory limit, as the settings have it."""
    return min(gib, _MOST_GIB) * 2**30 // 1


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def settings_from(settings: type[BaseModel], *fields: str, **defaults: object) -> Callable[[Callable], Callable]:
    """Give a command an option for each of some fields of its settings, in the place of its parameter `**chosen`.

    Type, default and help of an option are the field's; pydantic judges the value, so that a limit stands once.

    Args:
        defaults: other defaults than the settings have.
    """

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
        made = [_option(name, settings.model_fields[name], defaults) for name in fields]
        # `--resume` and `--overwrite` are the last that anyone looks for.
        parameters = sorted([*own, *made], key=lambda parameter: parameter.name == "resume")
        command.__signature__ = signature.replace(
            parameters=[each.replace(kind=each.KEYWORD_ONLY) for each in parameters]
        )
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _option(name: str, field: FieldInfo, defaults: dict[str, object]) -> inspect.Parameter:
    kind, choices = _plain(field.annotation)
    more = dict(IS_PATH) if kind in (Path, Path | None) else {"metavar": "|".join(choices)} if choices else {}
    flag = [f"--{name.replace('_', '-')}"] if kind is bool and not field.default else []
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=defaults.get(name, field.default),
        annotation=Annotated[kind, typer.Option(*flag, help=field.description, **more)],
    )


def _plain(annotation: object) -> tuple[object, tuple[str, ...]]:
    """What typer takes for a field's annotation, and the choices of a `Literal`."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        (plain, choices), *_ = [_plain(one) for one in get_args(annotation) if one is not type(None)]
        return plain | None, choices
    return annotation, ()
