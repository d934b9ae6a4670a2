"""Writing the GGUF file: keys, tokenizer, and tensors quantised one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from factorllm.dense.families import head_dim, sliding_window
from factorllm.dense.gguf.file import open_gguf
from factorllm.dense.gguf.rope import rope_keys
from factorllm.dense.safetensors import download
from factorllm.errors import FactorLLMError, refusing
from factorllm.exporting.checkpoints import Checkpoint, open_checkpoint
from factorllm.exporting.tensors import gguf_tensors
from factorllm.exporting.tokenizer import add_tokenizer, copy_tokenizer
from factorllm.report.summary import RUN_FILE
from factorllm.runs.digest import digest_of
from factorllm.runs.disk import explain_full_disk, require_space
from factorllm.runs.output import Kind, check_output, is_done, located, own_files, workspace_folder
from factorllm.runs.stored import refuse_unquantisable
from factorllm.text.calibration import file_digest

FILE_TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
"""Types by the names that llama.cpp has for them."""

_MAGIC = b"GGUF"
_JOB_KEY = "factorllm.convert.job"
"""The key that says what made a file: JSON."""

_OUTER = ("token_embd.weight", "output.weight")
_EXACT = ("ffn_gate_inp.weight",)  # routers: small, and they decide which experts run


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was written.

    Attributes:
        size: bytes.
        larger: names of tensors that could not take the wanted type, with the type that they took.
    """

    path: Path
    size: int
    larger: dict[str, str]


def export_gguf(
    model: str,
    out: str | Path,
    file_type: str = "q8_0",
    *,
    tokenizer: Path | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda message: None,
    when_full: str = "free some, or choose another -o",
) -> Exported:
    """Write a student, or a dense or pruned model, as one GGUF file. It appears whole or not at all.

    Args:
        model: a folder that factorllm wrote, or whatever `factorize` takes.
        file_type: one of `FILE_TYPES`. Vectors and routers stay fp32; with types of fewer than 8 bits the embeddings
            and the output head are q8_0.
        tokenizer: a GGUF file to copy the tokenizer from, instead of building it.
        top_k: experts that run for a token, for hosts that let it be changed.
        overwrite: replace a GGUF file at `out`.
        say: is told of tensors that take a larger type, before anything is written.
        when_full: what to do when the disk is too small.

    Raises:
        FactorLLMError: when llama.cpp would compute something else, or the file cannot be written.

    Example:
        >>> export_gguf("student", "student.gguf", "q8_0").path.name
        'student.gguf'
    """
    if file_type not in FILE_TYPES:
        raise FactorLLMError(
            f"no type {file_type!r}; types: {', '.join(FILE_TYPES)}. For K-quants write f16 and run llama-quantize"
        )
    out = located(out)
    check_output(out, GGUF_FILE, [model, tokenizer])
    checkpoint = open_checkpoint(model)
    if reason := checkpoint.host.reason_against_gguf(checkpoint.config):
        raise FactorLLMError(
            f"{model} cannot be exported: {reason}, so its outputs would be wrong; factorize with --host "
            "granitemoeshared or mixtral, or serve it with transformers or vLLM"
        )
    if top_k is not None:
        checkpoint = checkpoint.with_top_k(top_k)
    job = _job(model, file_type, tokenizer, top_k)
    if not overwrite and is_done(out, GGUF_FILE, job):
        say("done already, with the same arguments")
        return Exported(out, out.stat().st_size, {})
    for message in _fallbacks(checkpoint, file_type):
        say(message)
    larger = _write(checkpoint, out, file_type, tokenizer, job, when_full)
    return Exported(out, out.stat().st_size, larger)


def _job(model: str, file_type: str, tokenizer: Path | None, top_k: int | None) -> dict[str, Any]:
    """Everything that decides the bytes of the file."""
    return {
        "model": _model_digest(model),
        "type": file_type,
        "tokenizer": tokenizer and file_digest(str(tokenizer)),
        "top_k": top_k,
        "versions": {package: version(package) for package in ("factorllm", "gguf")},
    }


def _model_digest(model: str) -> str:
    path = Path(model).expanduser()
    if path.is_file():
        return digest_of([path])
    folder = path if path.is_dir() else download(model)
    beside = [file for file in own_files(folder) if file.name != RUN_FILE]
    return digest_of([*beside, *sorted(folder.glob("*.safetensors"))])


def _write(
    checkpoint: Checkpoint, out: Path, file_type: str, tokenizer: Path | None, job: dict[str, Any], when_full: str
) -> dict[str, str]:
    """Stream the tensors into a file beside `out`: their shapes are known first, so memory stays at one tensor, and
    the disk at one file.

    Returns:
        Names of tensors that could not take the wanted type, with the type that they took.
    """
    partial = workspace_folder(out)
    if partial.exists() and partial.stat().st_size and _read_gguf(partial) is None:
        raise FactorLLMError(f"{partial} exists and is no unfinished file of factorllm; move it away")
    writer = gguf.GGUFWriter(partial, checkpoint.host.gguf(checkpoint.config))
    _add_keys(writer, checkpoint, file_type)
    writer.add_string(_JOB_KEY, json.dumps(job, sort_keys=True))
    if tokenizer:
        copy_tokenizer(writer, tokenizer, checkpoint.config.vocab_size)
    else:
        add_tokenizer(writer, checkpoint.tokenizer, checkpoint.config.vocab_size)
    shapes = {name: tensor.shape for name, tensor in gguf_tensors(replace(checkpoint, read=_without_data(checkpoint)))}
    kinds = {name: _type_of(name, shape, file_type) for name, shape in shapes.items()}
    sizes = {name: _size(shape, kinds[name]) for name, shape in shapes.items()}
    require_space(out, sum(sizes.values()), when_full)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=kinds[name])
    with refusing(out, "choose another -o"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(out, when_full):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in gguf_tensors(checkpoint):
                refuse_unquantisable(name, tensor, kinds[name].name)
                writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), kinds[name]))
            writer.close()
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    wanted = FILE_TYPES[file_type][0]
    return {name: kind.name for name, kind in kinds.items() if kind is Type.F16 and wanted is not Type.F16}


def _without_data(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A way to read that gives shapes only."""
    return lambda name: torch.empty(checkpoint.shape(name), device="meta")


def _size(shape: Sequence[int], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _read_gguf(path: Path) -> dict[str, Any] | None:
    """What made a GGUF file, under `job` if it was factorllm; None for a file of another kind."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return None
    with suppress(FactorLLMError, ValueError):
        field = open_gguf(path).fields.get(_JOB_KEY)
        return {"job": json.loads(field.contents())} if field else {}
    return {}


GGUF_FILE = Kind("a GGUF file", False, _read_gguf)


def _type_of(name: str, shape: Sequence[int], file_type: str) -> Type:
    wanted = FILE_TYPES[file_type][0]
    if len(shape) == 1 or name.endswith(_EXACT):
        return Type.F32
    if name in _OUTER and wanted not in (Type.F32, Type.F16, Type.BF16):
        wanted = Type.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else Type.F16


def _fallbacks(checkpoint: Checkpoint, file_type: str) -> list[str]:
    """What cannot be quantised as wanted, from the config alone."""
    block = gguf.GGML_QUANT_SIZES[FILE_TYPES[file_type][0]][0]
    shape = checkpoint.host.shape(checkpoint.config)
    widths = {"the hidden size": checkpoint.config.hidden_size}
    if shape.experts:
        widths |= {"the width of an expert": shape.expert_width, "the width of the shared expert": shape.shared_width}
    else:
        widths |= {"the width of the FFN": shape.shared_width}
    return [
        f"{what}, {width}, is no multiple of {block}: tensors with such rows take f16 instead of {file_type}"
        for what, width in widths.items()
        if width % block
    ]


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Checkpoint, file_type: str) -> None:
    config, architecture = checkpoint.config, checkpoint.host.gguf(checkpoint.config)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    if checkpoint.licence:
        writer.add_license(checkpoint.licence)
    writer.add_file_type(FILE_TYPES[file_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    # llama.cpp has no sliding window here; within one window there is no difference.
    writer.add_context_length(min(config.max_position_embeddings, sliding_window(config) or 1 << 30))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in (checkpoint.host.gguf_keys(config) | rope_keys(config.rope_parameters)).items():
        add[type(value)](f"{architecture}.{key}", value)
