"""Writing the GGUF file: keys, tokenizer, and tensors quantised one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from factorllm.checkpoint import explain_full_disk, refuse_existing
from factorllm.errors import FactorLLMError
from factorllm.export.checkpoints import Checkpoint, open_checkpoint
from factorllm.export.tensors import gguf_tensors
from factorllm.export.tokenizer import add_tokenizer, copy_tokenizer
from factorllm.families import head_dim, sliding_window
from factorllm.sources.gguf_rope import rope_keys

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
    out: Path,
    file_type: str = "q8_0",
    *,
    tokenizer: Path | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Write a student, or a dense or pruned model, as one GGUF file. It appears whole or not at all.

    Args:
        model: a folder that factorllm wrote, or whatever `factorize` takes.
        file_type: one of `FILE_TYPES`. Vectors and routers stay fp32; with types of fewer than 8 bits the embeddings
            and the output head are q8_0.
        tokenizer: a GGUF file to copy the tokenizer from, instead of building it.
        top_k: experts that run for a token, for hosts that let it be changed.
        say: is told of tensors that take a larger type, before anything is written.

    Raises:
        FactorLLMError: when llama.cpp would compute something else, or the file cannot be written.
    """
    if file_type not in FILE_TYPES:
        raise FactorLLMError(
            f"no type {file_type!r}; types: {', '.join(FILE_TYPES)}. For K-quants write f16 and run llama-quantize"
        )
    if not overwrite:
        refuse_existing(out)
    checkpoint = open_checkpoint(model)
    if reason := checkpoint.host.reason_against_gguf(checkpoint.config):
        raise FactorLLMError(
            f"{model} cannot be exported: {reason}, so its outputs would be wrong; factorize with --host "
            "granitemoeshared or mixtral, or serve it with transformers or vLLM"
        )
    if top_k is not None:
        checkpoint = checkpoint.with_top_k(top_k)
    for message in _fallbacks(checkpoint, file_type):
        say(message)
    partial = out.with_name(out.name + ".tmp")
    with explain_full_disk(out):
        try:
            larger = _write(checkpoint, partial, file_type, tokenizer)
            partial.replace(out)
        except (PermissionError, FileNotFoundError) as error:
            raise FactorLLMError(f"cannot write {out}: {error.strerror}; choose another -o") from None
        finally:
            partial.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, larger)


def _write(checkpoint: Checkpoint, path: Path, file_type: str, tokenizer: Path | None) -> dict[str, str]:
    config = checkpoint.config
    # The temporary file holds the tensors until their number and types are known: memory stays at one tensor.
    writer = gguf.GGUFWriter(path, checkpoint.host.gguf(config), use_temp_file=True)
    _add_keys(writer, checkpoint, file_type)
    if tokenizer:
        copy_tokenizer(writer, tokenizer, config.vocab_size)
    else:
        add_tokenizer(writer, checkpoint.tokenizer, config.vocab_size)
    larger = {}
    for name, tensor in gguf_tensors(checkpoint):
        kind = _type_of(name, tensor, file_type)
        if kind is Type.F16 and FILE_TYPES[file_type][0] is not Type.F16:
            larger[name] = kind.name
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return larger


def _type_of(name: str, tensor: Tensor, file_type: str) -> Type:
    wanted = FILE_TYPES[file_type][0]
    if tensor.dim() == 1 or name.endswith(_EXACT):
        return Type.F32
    if name in _OUTER and wanted not in (Type.F32, Type.F16, Type.BF16):
        wanted = Type.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if tensor.shape[-1] % block == 0 else Type.F16


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
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (checkpoint.host.gguf_keys(config) | rope_keys(config.rope_parameters)).items():
        add[type(value)](f"{architecture}.{key}", value)
