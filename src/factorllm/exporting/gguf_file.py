"""`export_gguf()`: a model as one GGUF file, its tensors quantised one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from torch import Tensor

from factorllm.dense.hub import download
from factorllm.errors import FactorLLMError
from factorllm.exporting.adapters import adapter_outputs, write_gguf_adapters
from factorllm.exporting.checkpoints import Checkpoint, open_checkpoint, refuse_unwritable
from factorllm.exporting.files import GGUF_FILE, add_job, publishing, unfinished
from factorllm.exporting.ggml import ONLY_GGML, WEIGHTED, check_ggml, quantize
from factorllm.exporting.gptq import LEVELS, quantize_compensated
from factorllm.exporting.grams import Grams
from factorllm.exporting.header import start_file
from factorllm.exporting.importance import TOKENS, Importance, read_importance, write_importance
from factorllm.exporting.plan import FILE_TYPES, Planned, check_file_type, fallbacks, larger, plan_tensors
from factorllm.exporting.sampling import add_sampling, ends_of, unheeded
from factorllm.exporting.tensors import gguf_tensors
from factorllm.exporting.tokenizer import add_tokenizer, copy_tokenizer, cut_otherwise, name_in_file
from factorllm.runs.apart import apart
from factorllm.runs.digest import digest_of
from factorllm.runs.given import given, given_count, given_if_any, given_settings
from factorllm.runs.output import check_output, companions, is_done, located
from factorllm.runs.progress import Meter, meter
from factorllm.runs.settings import Settings
from factorllm.runs.stored import refuse_unquantisable
from factorllm.student.adapters import adapter_files
from factorllm.text.calibration import file_digest, public_name

_GPTQ = tuple(name for name, (kind, _) in FILE_TYPES.items() if kind in LEVELS)


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was written.

    Attributes:
        size: bytes.
        larger: names of tensors that could not take the wanted type, with the type that they took.
        importance: the importance-matrix file that was written beside it, where there was a text.
        adapters: those of a student that has one for each kind of text, beside it.
    """

    path: Path
    size: int
    larger: dict[str, str]
    importance: Path | None = None
    adapters: Sequence[Path] = ()


@apart()
def export_gguf(
    model: str | Path,
    out: str | Path,
    file_type: str = "q8_0",
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    gptq: bool = False,
    tokenizer: str | Path | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda message: None,
    console: Console | None = None,
    when_full: str = "free some, or choose another -o",
    weigh: Callable[[Checkpoint, str, int, Console], Importance] = read_importance,
    made_with: Settings | None = None,
) -> Exported:
    """Write a student, or a dense or pruned model, as one GGUF file. It appears whole or not at all.

    Args:
        model: a folder that factorllm wrote, or whatever `factorize` takes. Adapters of a student are files beside it,
            NAME.kind-0.gguf and so on.
        file_type: one of `FILE_TYPES`. Vectors and routers stay fp32; with types of fewer than 8 bits the embeddings
            and the output head are q8_0.
        text: a text as for `factorize`, on `tokens` of which is measured what each input channel counts: what counts
            more is kept better. The importance-matrix file of llama.cpp is written too, as NAME.imatrix.gguf.
        gptq: round so that errors are made good on the text, which takes minutes; for `q4_0` and `iq4_nl`.
        tokenizer: a GGUF file to copy the tokenizer from, instead of building it.
        top_k: experts that run for a token, for hosts that let it be changed.
        overwrite: replace a GGUF file at `out`.
        say: is told of tensors that take a larger type, and of text that llama.cpp cuts otherwise, before anything is
            written.
        console: where progress is shown.
        when_full: what to do when the disk is too small.
        weigh: how the model is run on the text; `WeighOnce` for files of several types of one model.
        made_with: settings of which the held-out part of the text is left alone; those of the checkpoint unless given.

    Raises:
        FactorLLMError: when llama.cpp would compute something else, or the file cannot be written.

    Example:
        >>> export_gguf("student", "student.gguf", "q8_0").path.name
        'student.gguf'
    """
    model, text = given(model), given_if_any(text)
    tokenizer = None if tokenizer is None else Path(given(tokenizer))
    tokens, top_k = given_count("--tokens", tokens), None if top_k is None else given_count("--top-k", top_k)
    made_with = None if made_with is None else given_settings(made_with, Settings())
    check_type(file_type, text, tokens, gptq)
    out = located(out)
    beside = [] if text is None else [out.with_name(f"{out.name.removesuffix('.gguf')}.imatrix.gguf")]
    adapters = adapter_outputs(model, out)
    outputs = [out, *beside, *adapters]
    for path in outputs:
        check_output(path, GGUF_FILE, [model, tokenizer, text])
    checkpoint = _open(model, top_k, made_with)
    job = _job(model, file_type, _weighed(text, tokens, gptq, made_with), tokenizer, top_k)
    if not overwrite and all(is_done(path, GGUF_FILE, job) for path in outputs):
        say("done already, with the same arguments")
        return Exported(out, out.stat().st_size, {}, next(iter(beside), None), adapters)
    _say(say, [*fallbacks(checkpoint, file_type), *_unweighted(file_type, text)])
    console = console or Console(quiet=True)
    # What can be refused is refused before the model is run on the text.
    plan = plan_tensors(checkpoint, out, file_type, when_full)
    partial = unfinished(out)
    writer = _writer(checkpoint, partial, file_type, tokenizer, plan, job)
    _say(say, [*([] if tokenizer else cut_otherwise(checkpoint.tokenizer)), *unheeded(checkpoint.generation)])
    importance = None if text is None else weigh(checkpoint, text, tokens, console)
    if importance is not None:
        _say(say, _seen(importance))
        write_importance(importance, beside[0], job, when_full)
    grams = Grams(checkpoint, text, tokens, console) if text is not None and gptq else None
    write_gguf_adapters(model, checkpoint, adapters, grams, job, when_full)
    with publishing(writer, partial, out, when_full), meter(console, f"writing {out.name}", len(plan)) as bar:
        _write_tensors(checkpoint, writer, plan, importance, grams, bar)
    return Exported(out, out.stat().st_size, larger(plan), next(iter(beside), None), adapters)


def _say(say: Callable[[str], None], messages: Sequence[str]) -> None:
    for message in messages:
        say(message)


def _open(model: str, top_k: int | None, made_with: Settings | None) -> Checkpoint:
    """The model, with the top-k that is wanted of it, and the settings that say what is held out.

    Raises:
        FactorLLMError: when llama.cpp would compute something else.
    """
    checkpoint = open_checkpoint(model)
    refuse_unwritable(checkpoint, model)
    if made_with is not None:
        checkpoint = replace(checkpoint, settings=lambda: made_with)
    return checkpoint if top_k is None else checkpoint.with_top_k(top_k)


def check_type(file_type: str, text: str | None, tokens: int = TOKENS, gptq: bool = False) -> None:
    """Refuse a type that there is not, or that cannot be quantised to here.

    Raises:
        FactorLLMError: with what to do instead.
    """
    check_file_type(file_type)
    if tokens < 1:
        raise FactorLLMError(f"--tokens {tokens} is no number of tokens to run; give at least 1")
    kind = FILE_TYPES[file_type][0]
    if gptq and (text is None or kind not in LEVELS):
        raise FactorLLMError(
            f"--gptq makes the errors of 4-bit rounding good on a text: give --text, and --type {' or '.join(_GPTQ)}"
        )
    if kind in ONLY_GGML or (text is not None and kind in WEIGHTED):
        check_ggml(", or export another --type without --text")


def _unweighted(file_type: str, text: str | None) -> list[str]:
    """What is said of importance weights that are not used."""
    kind = FILE_TYPES[file_type][0]
    if text is None and kind in ONLY_GGML:
        return [f"{file_type} without importance weights; `factorllm export --text` takes them from a text"]
    if text is not None and kind not in WEIGHTED:
        return [f"{file_type} takes no importance weights: they are written for llama-quantize only"]
    return []


def _seen(importance: Importance) -> list[str]:
    """What is said of the text that the model was run on."""
    sequences, length = importance.shape
    said = [f"weighted by {sequences * length:,} tokens of {importance.text}"]
    if importance.never_run:
        said.append(f"experts that no token ran: {importance.never_run}, weighted by all tokens of their layers")
    return said


def _weighed(text: str | None, tokens: int, gptq: bool, made_with: Settings | None) -> dict[str, Any]:
    """What decides how weights are rounded on a text, where there is one."""
    if text is None:
        return {}
    found: dict[str, Any] = {"text": public_name(text), "text file": file_digest(text), "tokens": tokens}
    if gptq:
        found["gptq"] = True
    if made_with is not None:
        found["held out"] = made_with.model_dump(include={"seed", "length", "held_out_tokens"})
    return found


def _job(
    model: str, file_type: str, weighed: dict[str, Any], tokenizer: Path | None, top_k: int | None
) -> dict[str, Any]:
    """Everything that decides the bytes of the file."""
    quantiser = ("xllamacpp",) if FILE_TYPES[file_type][0] in (WEIGHTED if weighed else ONLY_GGML) else ()
    return {
        "model": _model_digest(model),
        "type": file_type,
        "tokenizer": tokenizer and file_digest(str(tokenizer)),
        "top_k": top_k,
        **weighed,
        "versions": {package: version(package) for package in ("factorllm", "gguf", *quantiser)},
    }


def _model_digest(model: str) -> str:
    path = Path(model)
    if path.is_file():
        return digest_of([path])
    folder = path if path.is_dir() else download(model)
    card = [file for file in (folder / "README.md",) if file.is_file()]  # its licence is in the file
    return digest_of([*card, *companions(folder), *sorted(folder.glob("*.safetensors")), *adapter_files(folder)])


def _writer(
    checkpoint: Checkpoint,
    partial: Path,
    file_type: str,
    tokenizer: Path | None,
    plan: dict[str, Planned],
    job: dict[str, Any],
) -> gguf.GGUFWriter:
    """All of the file but the tensors' data; nothing is on disk yet."""
    named = replace(checkpoint, name=name_in_file(checkpoint.name, checkpoint.tokenizer))
    writer = start_file(partial, named, file_type, plan)
    add_job(writer, job)
    add_sampling(writer, checkpoint.generation, checkpoint.config.max_position_embeddings)
    if tokenizer:
        copy_tokenizer(writer, tokenizer, checkpoint.tokenizer, checkpoint.config.vocab_size)
    else:
        add_tokenizer(writer, checkpoint.tokenizer, checkpoint.config.vocab_size, ends_of(checkpoint.generation))
    return writer


def _write_tensors(
    checkpoint: Checkpoint,
    writer: gguf.GGUFWriter,
    plan: dict[str, Planned],
    importance: Importance | None,
    grams: Grams | None,
    bar: Meter,
) -> None:
    for name, tensor in gguf_tensors(checkpoint):
        kind = plan[name].kind
        refuse_unquantisable(name, tensor, kind.name)
        writer.write_tensor_data(_quantized(name, tensor, kind, importance, grams))
        bar.advance(1)


def _quantized(name: str, tensor: Tensor, kind: Type, importance: Importance | None, grams: Grams | None) -> np.ndarray:
    """A tensor's bytes. The older types without weights are made by the package gguf, which needs no llama.cpp."""
    data = (grams.in_order(name, tensor) if grams else tensor).contiguous().numpy()
    if grams and kind in LEVELS and (inputs := grams.of(name)) is not None:
        return quantize_compensated(name, data, kind, inputs)
    weights = importance.weights(name) if importance and kind in WEIGHTED else None
    if kind in ONLY_GGML or weights is not None:
        return quantize(name, data, kind, weights)
    return gguf.quants.quantize(data, kind)
