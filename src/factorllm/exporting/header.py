"""What a GGUF file says of a model and of its tensors, before their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from factorllm.dense.families import head_dim, key_value_heads, rope_of, rope_type, rotary_share, sliding_window
from factorllm.dense.gguf.rope import rope_keys
from factorllm.exporting.checkpoints import Layout
from factorllm.exporting.plan import FILE_TYPES, Planned
from factorllm.hosts.base import GGUFKeys


class _Writer(gguf.GGUFWriter):
    """It writes lists that are empty too, which gguf leaves out: a tokenizer of single bytes has no merges, and a file
    without their key is loaded by nothing."""

    def add_token_merges(self, merges: Sequence[str]) -> None:
        self.add_key_value(gguf.Keys.Tokenizer.MERGES, merges, GGUFValueType.ARRAY, GGUFValueType.STRING)

    def _pack_val(self, val: Any, vtype: GGUFValueType, *more: Any, **named: Any) -> bytes:
        if vtype is GGUFValueType.ARRAY and not len(val):
            return self._pack("I", vtype) + self._pack("I", GGUFValueType.STRING) + self._pack("Q", 0)
        return super()._pack_val(val, vtype, *more, **named)


def start_file(path: Path, model: Layout, file_type: str, plan: dict[str, Planned]) -> gguf.GGUFWriter:
    """What a file says of a model and its tensors; nothing is on disk yet, and of the tokenizer nothing is said."""
    writer = _Writer(path, model.host.gguf(model.config))
    _add_keys(writer, model, file_type)
    for name, planned in plan.items():
        writer.add_tensor_info(name, planned.shape, np.dtype(np.float32), planned.size, raw_dtype=planned.kind)
    return writer


def _add_keys(writer: gguf.GGUFWriter, checkpoint: Layout, file_type: str) -> None:
    config, architecture = checkpoint.config, checkpoint.host.gguf(checkpoint.config)
    writer.add_type("model")
    writer.add_name(checkpoint.name)
    if checkpoint.licence:
        writer.add_license(checkpoint.licence)
    writer.add_file_type(FILE_TYPES[file_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    # Most architectures of llama.cpp have no sliding window; within one window there is no difference.
    window = None if checkpoint.form.gguf_has_windows else sliding_window(config)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in _keys(checkpoint).items():
        add[type(value)](f"{architecture}.{key}", value)


def _keys(checkpoint: Layout) -> GGUFKeys:
    """What differs between architectures, the more general first."""
    config, form, width = checkpoint.config, checkpoint.form, head_dim(checkpoint.config)
    keys: GGUFKeys = {
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.head_count_kv": key_value_heads(config),
        "rope.dimension_count": width if rope_type(config) == "proportional" else int(width * rotary_share(config)),
    }
    if eps := getattr(config, "rms_norm_eps", None) or getattr(config, "norm_eps", None):
        keys["attention.layer_norm_rms_epsilon"] = float(eps)
    if eps := getattr(config, "layer_norm_eps", None):
        keys["attention.layer_norm_epsilon"] = float(eps)
    if form.gguf_has_windows:
        keys["attention.sliding_window"] = sliding_window(config) or config.max_position_embeddings
        keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        if (within := rope_of(config, "sliding_attention")) is not config.rope_parameters:
            keys["rope.freq_base_swa"] = float(within["rope_theta"])
    if checkpoint.wrapper:
        keys |= checkpoint.wrapper.gguf_keys
    keys |= rope_keys(rope_of(config)) | form.gguf_other_keys(config) | checkpoint.host.gguf_keys(config)
    having = [bool(checkpoint.host.gguf_ffn_at(layer, config)) for layer in range(config.num_hidden_layers)]
    if not all(having):
        keys["feed_forward_length"] = [keys["feed_forward_length"] * has for has in having]
    return keys
