"""Damaged inputs by the thousand: each is done right or refused in one line, and inputs are never changed.

The number of inputs of a run is FACTORLLM_FUZZ. `make test` draws the same ones every time, `make test-slow` new ones.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from fuzzing import (
    ALL_RUN,
    DENSE,
    GGUFS,
    SHARDED,
    Bases,
    as_transformers_reads,
    bounded_memory,
    check_end,
    check_no_output,
    check_same,
    check_student,
    check_student_of_gguf,
    check_trimmed,
    digest,
    fresh_copy,
    logits_of,
    make_bases,
    model_of_gguf,
    refused,
    run,
)
from gguf_parts import gguf_changes, taken_apart
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import (
    HUGE,
    MISSING,
    ODD_VALUES,
    TENSOR_CHANGES,
    InHeader,
    InJson,
    InTensors,
    Replaced,
    damage_of,
    edits_of,
)
from safetensors.torch import load_file

from factorllm.dense import open_model
from factorllm.hosts import choose_host
from factorllm.recipe import parse_recipe
from factorllm.runs.settings import Settings
from factorllm.student.read import read_partitions, read_provenance
from factorllm.text import read_calibration_text

IN_ALL, IN_CI, SLOWLY = 2_000, 500, 10_000
FEW = ("--tokens", 64, "--held-out-tokens", 64, "--no-baseline", "--device", "cpu")
TEXT_SETTINGS = Settings(tokens=64, held_out_tokens=32, length=16)

Sampled = st.SearchStrategy


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        share: how many of 2,000 inputs are of it.
        examples: what is drawn, made from the bases.
        check: is given the bases, a folder to work in, and an example.
    """

    share: int
    examples: Callable[[Bases], Sampled]
    check: Callable[[Bases, Path, object], None]


# ---------------------------------------------------------------- model folders: config.json

_THETA = {"rope_theta": 10000.0}
_ROPES = (
    *(
        {"rope_type": kind} | _THETA
        for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "")
    ),
    *({"rope_type": kind, "factor": 4.0} | _THETA for kind in ("default", "linear", "dynamic", "yarn", "llama3", "su")),
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16} | _THETA,
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, "beta_fast": 8, "mscale": 0.7} | _THETA,
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0} | _THETA,
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    | _THETA,
    *({"rope_type": "linear", "factor": factor} | _THETA for factor in (0, -2.0, 1.0, "4", None, 1e30)),
    *({"rope_type": "default", "rope_theta": theta} for theta in (0, -1.0, 1.0, 5e5, "1e4", None, float("inf"))),
    {"rope_type": "default", "partial_rotary_factor": 0.5} | _THETA,
    {"rope_type": "default", "mrope_section": [1, 1, 2]} | _THETA,
    {"full_attention": {"rope_type": "default"} | _THETA, "sliding_attention": {"rope_type": "default"} | _THETA},
    {"type": "linear", "factor": 2.0},
    {"factor": 2.0},
)
_CONFIG: dict[str, tuple] = {
    "model_type": (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "mixtral",
        "gpt2",
        "no-such-model",
        "LLAMA",
        None,
        7,
    ),
    "architectures": (None, [], ["LlamaModel"], ["LlamaForSequenceClassification"], ["NoSuch"], "LlamaForCausalLM"),
    "tie_word_embeddings": (True, False, None, "true", 1),
    "rope_parameters": _ROPES,
    "rope_scaling": _ROPES,
    "rope_theta": (1.0, 5e5, "10000", 0, None),
    "hidden_size": (31, 33, 64, 0, HUGE),
    "intermediate_size": (0, 63, 65, 128, "64", [64, 64], HUGE),
    "num_hidden_layers": (0, 1, 3, -1, "2", 2.0, HUGE),
    "num_attention_heads": (0, 1, 2, 3, 8, 5, HUGE),
    "num_key_value_heads": (0, 1, 3, 4, 8, None, HUGE),
    "head_dim": (0, 4, 7, 16, 32, None, HUGE),
    "vocab_size": (0, 1, 263, 265, 320, HUGE),
    "max_position_embeddings": (0, 1, 7, 8, 9, 64, 16.5, None, HUGE),
    "rms_norm_eps": (0, 1e-5, -1.0, 1.0, "1e-6", None, float("nan")),
    "hidden_act": ("gelu", "relu", "swish", "no-such-act", None, ["silu"]),
    "mlp_bias": (True, None, "no"),
    "attention_bias": (True, None, 1),
    "attention_dropout": (0.5, -1, "0", None),
    "sliding_window": (None, 0, 1, 4, 8, 16, 64, -1, "16", HUGE),
    "use_sliding_window": (True, False, None),
    "max_window_layers": (0, 1, 2, None),
    "layer_types": (
        None,
        [],
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["sliding_attention", "full_attention"],
        ["linear_attention"] * 2,
        ["full_attention"],
    ),
    "bos_token_id": (None, -1, 0, 264, HUGE, [256, 257], "<s>"),
    "eos_token_id": (None, -1, 0, 264, HUGE, [257, 256], [], "</s>"),
    "pad_token_id": (-1, 0, 263, 264, HUGE, [0], "<pad>"),
    "dtype": ("float16", "bfloat16", "float64", "float8_e4m3fn", "int8", "auto", "half", "torch.float16", "fp32", None),
    "torch_dtype": ("float16", "bfloat16", "torch.bfloat16", "no"),
    "auto_map": (
        {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"},
        {"AutoConfig": "someone/else--configuration_x.XConfig"},
        {"AutoModelForCausalLM": ["modeling_x.X", None]},
    ),
    "quantization_config": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "no-such-method"},
        {"bits": 4},
        {},
        "gptq",
        [],
    ),
    "output_attentions": (True,),
    "output_hidden_states": (True,),
    "return_dict": (False,),
    "use_return_dict": (False,),
    "use_cache": (False, None),
    "is_encoder_decoder": (True,),
    "is_decoder": (True,),
    "add_cross_attention": (True,),
    "chunk_size_feed_forward": (1,),
    "pruned_heads": ({"0": [0]},),
    "_attn_implementation": ("eager", "flash_attention_2", "no-such"),
    "attn_implementation": ("eager", "flash_attention_2", "no-such"),
    "text_config": ({}, {"model_type": "llama"}, {"hidden_size": 64}),
    "num_labels": (0, 3, "x"),
    "id2label": ({"0": "a"}, ["a"], 3),
    "transformers_version": (None, 5, "99.0.0"),
    "_name_or_path": (None, 7, "../../x"),
    "name_or_path": ("x",),
    "num_local_experts": (8,),
    "temperature": (0.0, 0.7),
    "max_length": (1,),
    "partial_rotary_factor": (0.5,),
    "logit_scale": (2.0,),
    "attention_multiplier": (2.0,),
    "mup_enabled": (True,),
}


def _configs(bases: Bases) -> Sampled:
    likely = {(key,): (MISSING, *values) for key, values in _CONFIG.items()}

    def changes(name: str) -> Sampled:
        document = bases.json(f"{name}/config.json")
        edits = edits_of(document, likely).map(lambda edits: InJson("config.json", edits))
        return st.tuples(st.just(name), st.one_of(edits, edits, edits, edits, damage_of("config.json")))

    return st.sampled_from(list(DENSE)).flatmap(changes)


def _read_all(model: Path) -> tuple | None:
    """Everything that is read of a dense model before the work, and the model itself; None where it is refused."""
    opened: list = []

    def read() -> None:
        source = open_model(str(model))
        settled = TEXT_SETTINGS.resolve(source.config)
        choose_host("auto", source.config, parse_recipe(ALL_RUN).shape(source.config.intermediate_size))
        tokenizer = source.tokenizer()
        loaded = source.load_model(torch.float32, settled.torch_device)
        _ = source.fingerprint, source.licence, source.generation_config(), settled.stored_dtype
        opened.append((source, tokenizer, logits_of(loaded)))

    return None if refused(read) else opened[0]


def _check_read_folder(bases: Bases, work: Path, example: tuple) -> None:
    name, change = example
    model = fresh_copy(bases.folder(name), work)
    change.apply(model)
    before = digest(model)
    read = _read_all(model)
    assert digest(model) == before
    if read:
        check_same(read[2], logits_of(as_transformers_reads(model, dtype=torch.float32)))


def _check_factorized_folder(bases: Bases, work: Path, example: tuple) -> None:
    name, change = example
    model, out = fresh_copy(bases.folder(name), work), work / "out"
    change.apply(model)
    if _factorized(bases, model, out):
        check_student(out, model)


def _factorized(bases: Bases, model: Path, out: Path, *options: object, text: Path | None = None) -> bool:
    """Whether `factorize` made something of a model; else it has refused as it must."""
    text = text or bases.folder("text.txt")
    before = digest(model, text)
    ended = run("factorize", model, "-o", out, "--recipe", ALL_RUN, "--text", text, *FEW, *options)
    assert digest(model, text) == before, "an input was changed"
    check_end(ended)
    if ended.code:
        check_no_output(out)
    return ended.code == 0


# ---------------------------------------------------------------- model folders: weights

_INDEX = "model.safetensors.index.json"


def _weights(bases: Bases) -> Sampled:
    single = "model.safetensors"
    names = sorted(load_file(bases.folder("llama") / single))
    shards = sorted(path.name for path in bases.folder(SHARDED).glob("model-*.safetensors"))
    index = bases.json(f"{SHARDED}/{_INDEX}")
    entries = {("weight_map", name): (MISSING, *shards[:2], "no.safetensors", "../x") for name in names}
    header = {(name, key): () for name in names[:4] for key in ("dtype", "shape", "data_offsets")}
    header_values = {
        "dtype": ("F16", "F64", "I8", "F8_E4M3", "F4", "X", "BOOL"),
        "shape": ([1], [32], [-1], [0], [2**62]),
        "data_offsets": ([0, 0], [0, 4], [-4, 0], [4, 0], [0, 2**62]),
    }
    header = {path: header_values[path[1]] for path in header}
    document = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in names[:4]}
    tensors = st.builds(InTensors, st.just(single), st.sampled_from(names), st.sampled_from(list(TENSOR_CHANGES)))
    whole = st.one_of(
        tensors,
        tensors,
        damage_of(single, header=2000),
        edits_of(document, header).map(lambda edits: InHeader(single, edits)),
        st.just(Replaced("pytorch_model.bin", "zeros")),
        edits_of(index).map(lambda edits: InJson(_INDEX, edits)),
    )
    sharded = st.one_of(
        edits_of(index, entries).map(lambda edits: InJson(_INDEX, edits)),
        damage_of(_INDEX),
        st.sampled_from(shards).flatmap(functools.partial(damage_of, header=200)),
        st.sampled_from([Replaced(single, by) for by in ("empty", "an object", "a folder", "a link to nowhere")]),
    )
    plain = st.sampled_from(["llama", "llama-tied", "qwen2"])
    return st.one_of(st.tuples(plain, whole), st.tuples(plain, whole), st.tuples(st.just(SHARDED), sharded))


# ---------------------------------------------------------------- model folders: tokenizer, generation, card

_TOKENIZER_FILES: dict[str, dict[str, tuple]] = {
    "tokenizer_config.json": {
        "tokenizer_class": ("LlamaTokenizer", "GPT2Tokenizer", "NoSuch", "../x", None, 7),
        "eos_token": (None, "<eos>", "", {"content": "</s>"}, {"__type": "AddedToken", "content": "<x>"}, 257),
        "bos_token": (None, "<bos>", "", 256),
        "pad_token": ("<pad>", None, 7),
        "added_tokens_decoder": ({"264": {"content": "<more>"}}, {"a": {}}, {"256": None}, []),
        "additional_special_tokens": (["<a>"], [None], "a", 7),
        "extra_special_tokens": (["<a>"], {"a": "<b>"}, 7),
        "chat_template": ("{{", "{% for %}", "{{ 1/0 }}", "", None, [{"name": "default", "template": "x"}], {"a": 1}),
        "model_max_length": (0, -1, 1e30, "x", None),
        "auto_map": ({"AutoTokenizer": ["tokenization_x.X", None]},),
        "add_bos_token": (True, "x"),
        "add_prefix_space": (True, None),
        "clean_up_tokenization_spaces": (True,),
        "split_special_tokens": (True,),
        "padding_side": ("left", "up"),
        "tokenizer_file": ("/nowhere/tokenizer.json", "../x"),
        "backend": ("tokenizers", "sentencepiece", "no"),
    },
    "tokenizer.json": {
        "model": (None, {}, {"type": "BPE"}, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, {"type": "X"}),
        "pre_tokenizer": (
            None,
            {"type": "Whitespace"},
            {"type": "NoSuch"},
            {"type": "Split", "pattern": {"Regex": "("}},
        ),
        "normalizer": ({"type": "NFC"}, {"type": "Replace", "pattern": {"String": "e"}, "content": ""}, {"type": "X"}),
        "post_processor": (None, {"type": "ByteLevel"}, {"type": "X"}),
        "decoder": (None, {"type": "ByteLevel"}, {"type": "X"}),
        "added_tokens": (
            [],
            None,
            [{"id": 264, "content": "<far>", "special": True}],
            [{"id": 0, "content": "</s>", "special": True}],
            [{"id": 300, "content": "e", "special": False, "normalized": False}],
        ),
        "truncation": (
            {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            {"max_length": 0},
        ),
        "padding": ({"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 999, "pad_token": "<p>"},),
        "version": ("2.0", None),
    },
    "special_tokens_map.json": {"eos_token": (None, "<eos>", "", 7), "unk_token": ("<unk>",), "x": ("y",)},
    "generation_config.json": {
        "eos_token_id": (None, -1, 9999, [257], "x"),
        "temperature": (0, -1.0, "hot", None),
        "do_sample": (True, "yes"),
        "max_length": (-1, 0, "x"),
        "cache_implementation": ("no-such",),
        "trust_remote_code": (True,),
        "transformers_version": (None, 7),
        "num_beams": (0, -1),
    },
    "added_tokens.json": {"<more>": (264, -1, "x", None)},
    "vocab.json": {"a": (0, -1, "x")},
}


def _tokenizers(bases: Bases) -> Sampled:
    def changes(name: str) -> Sampled:
        path = bases.folder("llama") / name
        document = json.loads(path.read_text()) if path.exists() else {}
        likely = {(key,): (MISSING, *values) for key, values in _TOKENIZER_FILES[name].items()}
        damaged = damage_of(name) if path.exists() else st.just(Replaced(name, "an open brace"))
        return st.one_of(edits_of(document, likely).map(lambda edits: InJson(name, edits)), damaged)

    others = [Replaced(name, by) for name in ("chat_template.jinja", "README.md") for by in ("no UTF-8", "a folder")]
    others += [Replaced("tokenizer.model", "zeros"), Replaced("merges.txt", "zeros"), Replaced("README.md", "a list")]
    files = st.sampled_from([*_TOKENIZER_FILES, "tokenizer.json", "tokenizer_config.json"]).flatmap(changes)
    return st.tuples(st.just("llama"), st.one_of(files, files, files, st.sampled_from(others)))


def _check_read_tokenizer(bases: Bases, work: Path, example: tuple) -> None:
    name, change = example
    model = fresh_copy(bases.folder(name), work)
    change.apply(model)
    before, found = digest(model), []

    def read() -> None:
        source = open_model(str(model))
        found.append(read_calibration_text(str(bases.folder("text.txt")), source.tokenizer(), TEXT_SETTINGS))
        _ = source.generation_config(), source.licence

    refused(read)
    assert digest(model) == before
    if found:
        _check_tokens(found[0], DENSE["llama"].vocab_size)


def _check_tokens(text, vocabulary: int) -> None:
    for tokens, count in ((text.calibration, 64), (text.held_out, 32)):
        assert tokens.shape == (count // TEXT_SETTINGS.length, TEXT_SETTINGS.length)
        assert tokens.min() >= 0
        assert tokens.max() < vocabulary, "a token that the model does not have"


_TRIMMED = ("--vocabulary", 260, "--tokens", 64, "--held-out-tokens", 64)


def _check_trimmed_folder(bases: Bases, work: Path, example: tuple) -> None:
    name, change = example
    model, out, text = fresh_copy(bases.folder(name), work), work / "out", bases.folder("text.txt")
    change.apply(model)
    before = digest(model, text)
    ended = run("trim", model, "-o", out, "--text", text, *_TRIMMED)
    assert digest(model, text) == before, "an input was changed"
    check_end(ended)
    if ended.code:
        check_no_output(out)
    else:
        check_trimmed(out, model)


# ---------------------------------------------------------------- GGUF files


def _gguf_keys(architecture: str) -> dict[str, tuple]:
    own = {
        "block_count": (0, 1, 3, HUGE, "2"),
        "context_length": (0, 1, 16, 64, HUGE),
        "embedding_length": (0, 31, 64, HUGE),
        "feed_forward_length": (0, 63, 128, HUGE, [64, 64]),
        "attention.head_count": (0, 1, 2, 3, 8, HUGE, [4, 4]),
        "attention.head_count_kv": (MISSING, 0, 1, 3, 4, HUGE, [2, 2], [2, 0]),
        "attention.key_length": (MISSING, 0, 4, 7, 32, HUGE),
        "attention.value_length": (MISSING, 0, 4, 32),
        "attention.layer_norm_rms_epsilon": (MISSING, 0.0, 1e-5, -1.0, 0.5, float("nan"), "x"),
        "attention.layer_norm_epsilon": (0.5,),
        "rope.dimension_count": (MISSING, 0, 4, 7, 32),
        "rope.freq_base": (MISSING, 0.0, 1.0, 5e5, -1.0, float("inf"), 7),
        "rope.freq_base_swa": (7.0,),
        "rope.scale_linear": (2.0, 4.0),
        "rope.scaling.type": ("none", "linear", "yarn", "longrope", "su", 7),
        "rope.scaling.factor": (0.0, 1.0, 2.0, 4.0, -1.0, "x"),
        "rope.scaling.original_context_length": (16, 0),
        "rope.scaling.attn_factor": (2.0,),
        "rope.scaling.finetuned": (True,),
        "rope.dimension_sections": ([1, 1, 2, 0],),
        "expert_count": (0, 8),
        "expert_used_count": (2,),
        "attention.sliding_window": (4, 0),
        "attention.scale": (0.5,),
        "attention.causal": (False,),
        "attention.clamp_kqv": (1.0,),
        "attention.max_alibi_bias": (8.0,),
        "attn_logit_softcapping": (5.0,),
        "final_logit_softcapping": (5.0,),
        "logit_scale": (2.0,),
        "embedding_scale": (2.0,),
        "residual_scale": (2.0,),
        "use_parallel_residual": (True,),
        "pooling_type": (1,),
        "tensor_data_layout": ("Meta AI original pth", "x"),
        "vocab_size": (0, 1, 999),
        "no_such_key": (1, "x", 0.5),
    }
    tokenizer = {
        "model": (MISSING, "llama", "gpt2", "bert", "no-such", "none", 7),
        "pre": (MISSING, "default", "llama-bpe", "qwen2", "falcon", "no-such", "", 7),
        "bos_token_id": (MISSING, 0, 999, HUGE, "x"),
        "eos_token_id": (MISSING, 0, 999, HUGE, "x"),
        "padding_token_id": (0, 999),
        "unknown_token_id": (0, 999),
        "add_bos_token": (True, False, 1),
        "add_eos_token": (True,),
        "add_space_prefix": (True,),
        "scores": ([0], MISSING),
        "merges": (MISSING, ["e r"], ["e"], ["no such"], [""], [1]),
        "tokens": (MISSING, ["a"], [1]),
        "token_type": (MISSING, [1], ["x"]),
    }
    general = {
        "general.architecture": (MISSING, "llama", "qwen2", "qwen3", "gemma2", "mistral", "no-such", "", 7),
        "general.license": ("mit", "", 7, ["a", "b"]),
        "general.name": ("", "x" * 300, 7),
        "general.alignment": (1, 7, 64),
        "general.file_type": (7, 999),
        "general.quantization_version": (1, 99),
        "split.count": (2,),
        "tokenizer.chat_template": ("{{", "", 7),
        "adapter.type": ("lora",),
    }
    return (
        {f"{architecture}.{key}": values for key, values in own.items()}
        | {f"tokenizer.ggml.{key}": values for key, values in tokenizer.items()}
        | general
    )


@dataclass(frozen=True)
class Several:
    """Changes one after the other."""

    changes: tuple

    def apply(self, folder: Path) -> None:
        for change in self.changes:
            change.apply(folder)


def _ggufs(bases: Bases) -> Sampled:
    def changes(name: str) -> Sampled:
        parts = taken_apart(bases.folder(f"gguf/{name}") / "model.gguf")
        architecture = parts.fields["general.architecture"][0]
        one = gguf_changes("model.gguf", parts, _gguf_keys(architecture))
        some = st.lists(one, min_size=1, max_size=2).map(lambda found: Several(tuple(found)))
        return st.tuples(st.just(name), st.one_of(some, some, some, damage_of("model.gguf", header=3000)))

    of_each = {name: changes(name) for name in GGUFS}
    return st.sampled_from(GGUFS).flatmap(of_each.__getitem__)


def _damaged_gguf(bases: Bases, work: Path, example: tuple) -> Path:
    name, change = example
    folder = fresh_copy(bases.folder(f"gguf/{name}"), work)
    change.apply(folder)
    return folder / "model.gguf"


def _check_read_gguf(bases: Bases, work: Path, example: tuple) -> None:
    model = _damaged_gguf(bases, work, example)
    before = digest(model.parent)
    read = _read_all(model)
    assert digest(model.parent) == before
    if read:
        check_same(read[2], logits_of(model_of_gguf(model)))


def _check_factorized_gguf(bases: Bases, work: Path, example: tuple) -> None:
    model, out = _damaged_gguf(bases, work, example), work / "out"
    if _factorized(bases, model, out):
        check_student_of_gguf(out, model)


# ---------------------------------------------------------------- texts

_Characters = st.characters(codec=None) | st.sampled_from(list("\ud83d\udc00\x00\r\u2028\ufeff\x1f"))
_Strings = st.text(_Characters, max_size=20)
_Leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(), _Strings, st.sampled_from(ODD_VALUES)
)
_Values = st.recursive(
    _Leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_Strings, inner, max_size=3), max_leaves=8
)
_Records = st.one_of(
    st.fixed_dictionaries({}, optional={"text": _Values, "content": _Strings, "source": _Leaves}), _Strings, _Values
)
_RAW = (b"[" * 100_000, b"", b"\xef\xbb\xbf", b"\x00" * 50, b"\r\n" * 9, b'{"text": "' + b"a" * 9, b"nan", b"{}")


@dataclass(frozen=True)
class TextFile:
    """A text file: its name, its good records, and what stands among them."""

    name: str
    content: bytes

    def apply(self, folder: Path) -> None:
        (folder / self.name).write_bytes(self.content)


def _texts(bases: Bases) -> Sampled:
    good = bases.folder("text.txt").read_text().split("\n\n")

    def file(suffix: str, odd: list, raw: bytes, around: bool) -> TextFile:
        records = [{"text": text} for text in good] if around else []
        return TextFile(f"text.{suffix}", _WRITERS[suffix](records, odd) + raw)

    raw = st.one_of(st.just(b""), st.just(b""), st.binary(max_size=40), st.sampled_from(_RAW))
    suffixes = st.sampled_from(["txt", "jsonl", "jsonl", "json", "json"])
    written = st.builds(file, suffixes, st.lists(_Records, max_size=3), raw, st.booleans())
    plain = st.builds(
        TextFile, st.sampled_from([f"text.{s}" for s in ("txt", "jsonl", "json", "parquet", "JSON", "")]), raw
    )
    named = st.sampled_from(["text.txt", "text.jsonl", "text.json", "text.parquet"])
    odd_files = st.builds(
        Replaced, named, st.sampled_from(["a folder", "a link to itself", "a link to nowhere", "missing"])
    )
    return st.one_of(written, written, written, plain, _parquets(good), odd_files)


def _texts_with_enough(bases: Bases) -> Sampled:
    return _texts(bases).filter(
        lambda change: len(getattr(change, "content", b"")) > 9_999 or len(getattr(change, "values", ())) > 9
    )


def _as_json(value: object) -> str:
    return json.dumps(value, skipkeys=True)


_WRITERS: dict[str, Callable[[list, list], bytes]] = {
    "txt": lambda records, odd: "\n\n".join(
        [*(str(value) for value in odd), *(record["text"] for record in records)]
    ).encode("utf-8", "surrogatepass"),
    "jsonl": lambda records, odd: "\n".join(_as_json(value) for value in [*odd, *records]).encode(),
    "json": lambda records, odd: _as_json([*odd, *records]).encode(),
}


@dataclass(frozen=True)
class Parquet:
    """A parquet file of one column; `damaged` cuts its end off."""

    column: str
    values: tuple
    damaged: bool

    def apply(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "text.parquet"
        try:
            pq.write_table(pa.table({self.column: list(self.values)}), path)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
            path.write_bytes(b"PAR1")
        if self.damaged:
            path.write_bytes(path.read_bytes()[:-9])


def _parquets(good: list[str]) -> Sampled:
    columns = st.one_of(
        st.lists(st.none() | st.just(good[0]), max_size=3),
        st.just(good),
        st.lists(st.integers(), max_size=3),
        st.lists(st.binary(max_size=5), max_size=3),
        st.lists(st.lists(st.text(max_size=5), max_size=2), max_size=3),
        st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=5)), max_size=3),
        st.lists(st.dates(), max_size=3),
    )
    names = st.sampled_from(["text", "content", "body", ""])
    return st.builds(Parquet, names, columns.map(tuple), st.booleans())


def _text_at(change, work: Path) -> Path:
    change.apply(work)
    return work / getattr(change, "name", "text.parquet")


def _check_read_text(bases: Bases, work: Path, change) -> None:
    fresh_copy(bases.folder("scores.json").parent / "students/prune", work)
    text, tokenizer, found = _text_at(change, work), _tokenizer(bases), []
    before = digest(text) if text.is_file() else None
    refused(lambda: found.append(read_calibration_text(str(text), tokenizer, TEXT_SETTINGS)))
    if before:
        assert digest(text) == before
    if found:
        _check_tokens(found[0], len(tokenizer))


def _check_factorized_text(bases: Bases, work: Path, change) -> None:
    model = fresh_copy(bases.folder("llama"), work)
    text = _text_at(change, work)
    if text.is_file() and _factorized(bases, model, work / "out", text=text):
        # Texts of one token again and again are among these: the fit says little then, and rounding fills the rest.
        check_student(work / "out", model, tolerance=2e-2)


@functools.lru_cache(1)
def _tokenizer(bases: Bases):
    return open_model(str(bases.folder("llama"))).tokenizer()


# ---------------------------------------------------------------- options

_WHOLE = ("-1", "0", "1", "2", "1e3", "0x10", "", "abc", "1.5", "nan", "99999999999999999999", "-99999999999999999999")
_REAL = ("-1", "0", "nan", "inf", "-inf", "1e400", "1e-300", "", "abc", "0,5")
_WORDS = ("", " ", "auto", "no-such", "None", "x" * 300, "ünï", "\udcff", "-", "a/b", "..", "[bold]", "{x}", "%s")
_RECIPES = (
    *("S2A2E8", "S4A0E8", "S2A6E8", "S0A4E8N3", "1R4E2K", "cmoe", "cmoe:S3A3E8", "moefication", "llama-moe"),
    *("S0A0E8", "S9A1E8", "S2A2E0", "S2A2E7", "S2A2E64", "S2A2E128", "S0A4E8N1", "S0A4E8N2", "S0A1E8N99", "s2a2e8"),
    *("2R4E2K", "1R0E0K", "1R4E5K", "cmoe:", "cmoe:cmoe", "cmoe:x", "S-1A2E8", "S2A2E8 ", "S" + "9" * 30 + "A1E8"),
    *("S2A2E99999999999999999999", "S0A8E8", "S8A0E8", "S1A1E2", "recipe.yaml", "nowhere.yaml", ".yaml", "S²A2E8"),
    *("cmoe:S0A4E8N3", "S٢A٢E٨", "factorllm-paper", "dense"),
)
_OUTS = (
    "",
    ".",
    "..",
    "new",
    "new/deep/er",
    "full",
    "empty",
    "file",
    "file/below",
    "x" * 300,
    "\udcff",
    "~nobody/x",
    "a\nb",
)
_MODELS = (
    "llama",
    "prune",
    "nowhere",
    "",
    ".",
    "..",
    "~nobody/x",
    "no/such",
    "file",
    "file.gguf",
    "\udcff",
    "\udcff/x",
    "x" * 5000,
)
_OF_FACTORIZE: dict[str, tuple[str, ...]] = {
    "--recipe": _RECIPES,
    "--tokens": ("-1", "0", "1", "64", "16384", *_WHOLE[4:]),
    "--host": ("auto", "mixtral", "granitemoeshared", "qwen2_moe", "qwen3_moe", "glm4_moe", "dense", *_WORDS),
    "--seed": (*_WHOLE, "4294967296", "18446744073709551616"),
    "--device": ("cpu", "cuda", "cuda:99", "meta", "mps", "cpu:7", *_WORDS),
    "--dtype": ("float32", "bfloat16", "float16", "float64", "int8", *_WORDS),
    "--tune": ("-1", "0", *_WHOLE[4:10]),
    "--memory-limit": ("-1", "0", "0.3", "nan", "inf", *_WHOLE[4:]),
    "--text": (
        "text.txt",
        "",
        ".",
        "empty",
        "file",
        "nowhere.txt",
        "nowhere.parquet",
        "no/such",
        "\udcff.txt",
        "x" * 300,
    ),
    "-o": _OUTS,
}
_OF_OTHERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sample": {
        "-o": ("new.jsonl", "new.txt", "empty.jsonl", "file/x.jsonl", "x" * 300 + ".jsonl", *_OUTS),
        "--tokens": ("-1", "0", "1", "40"),
        "--length": ("-1", "0", "7", "8", "9999", "abc"),
        "--temperature": (*_REAL, "0.7", "1e300"),
        "--seed": _WHOLE,
        "--device": ("cpu", "meta", *_WORDS),
    },
    "export": {
        "-o": ("new.gguf", "empty", "full", "file", "file/x", *_OUTS),
        "--type": ("f32", "q8_0", "q4_0", "q4_k_m", *_WORDS),
        "--tokenizer": ("file", "file.gguf", "nowhere", "", ".", "empty", "\udcff", "model.gguf"),
        "--top-k": _WHOLE,
    },
    "heal": {
        "--tokens": _WHOLE[:2],
        "--epochs": ("-1", "0", "abc"),
        "--train": ("no-such", ""),
        "--gates": ("no-such", ""),
        "--learning-rate": ("-1", "0", "nan", "inf", "abc"),
        "--temperature": ("-1", "0", "nan", "inf"),
        "--pa-weight": ("-1", "nan", "inf"),
        "--batch": ("-1", "0", "3", "99999999999999999999"),
        "--micro-batch": ("-1", "0", "99999999999999999999"),
        "--precision": ("float16", ""),
        "--device": ("abacus", "", "meta"),
        "--text": ("", "empty", "file", "nowhere.txt", "\udcff.txt"),
        "-o": _OUTS,
    },
    "trim": {
        "--vocabulary": (*_WHOLE, "258", "263", "264"),
        "--tokens": ("-1", "0", "1", "64", *_WHOLE[4:]),
        "--text": ("text.txt", "", ".", "empty", "file", "nowhere.txt", "no/such", "\udcff.txt", "x" * 300),
        "-o": _OUTS,
    },
    "inspect": {"--prompt": ("", " ", "a b", "\udcff", "[bold]x[/]", "<s></s>", "\x00"), "--layer": _WHOLE},
    "eval": {
        "--tasks": ("", ",", "no-such", "generation", " , "),
        "--data": ("nowhere", "file", "", "empty"),
        "--limit": ("-1", "0", "abc"),
        "--text": ("", "empty", "file", "nowhere.txt", "text.txt"),
        "--chain": ("", "empty", "file", "nowhere.yaml", "text.txt", "\udcff.yaml", "\x00"),
        "--dtype": ("foo", "", "int8", "Tensor", "float32"),
        "--device": ("abacus", "", "meta", "cpu"),
        "--against": ("nowhere", "", "file"),
        "-o": ("new.json", "file/x", "empty", "", "x" * 300),
    },
    "report": {
        "--against": ("nowhere", "", "file"),
        "--scores": ("nowhere", "", "file", "empty", "."),
        "--speed": ("nowhere", "", "file", "empty", "."),
        "--device": ("abacus", "", "meta"),
        "-o": ("file", "file/x", "x" * 300, ""),
    },
    "bench": {
        "--against": ("nowhere", "", "file"),
        "--engine": ("no-such", "", "vllm", "llama.cpp"),
        "--rounds": ("-1", "0", "1", "abc"),
        "--batch": ("-1", "0", "abc"),
        "--threads": ("-1", "0", "abc"),
        "--type": ("q9", ""),
    },
    "serve": {
        "--engine": ("no-such", "", "transformers", "vllm"),
        "--port": ("-1", "65536", "99999999999999999999", "abc"),
        "--type": ("q9", ""),
        "--context": ("-1", "0", "abc"),
        "--parallel": ("-1", "0", "abc"),
        "--threads": ("-1", "abc"),
    },
    "hosts": {"--no-such": ("x",), "": ("",)},
    "no-such-command": {"": ("x",)},
    "": {"--version": ("",), "--no-such": ("",)},
}
_MUST_REFUSE = ("bench", "serve")
"""Commands that would go on for long: at least one of their options is one that must be refused."""

_RECIPE_KEYS = {"shared": 2, "active": 2, "parts": 8}
_YAMLS = (
    *("", "a", "- 1", "shared: 2", "{", "\t", "shared: 2\nshared: 3\nactive: 2\nparts: 8", "!!python/name:os.system x"),
    *("&a [*a]", "? [a]\n: 1", "shared: .nan\nactive: 2\nparts: 8", "1: 2", "shared: 2\nactive: 2\nparts: 8\nmore: 1"),
    *(
        "a: &a [x]\n" + "".join(f"b{i}: [*a, *a]\n" for i in range(9)),
        "\udcff",
        "shared: 2024-01-01",
        "%YAML 9.9\n---\n",
    ),
)


def _yamls() -> Sampled:
    edits = st.lists(
        st.tuples(
            st.sampled_from(
                ["shared", "active", "parts", "overlapping", "partition", "router", "prior", "restore", "x"]
            ),
            st.sampled_from([*ODD_VALUES, "energy", "random", "paper", "none"]),
        ),
        min_size=1,
        max_size=2,
    )
    return st.one_of(edits.map(lambda found: json.dumps(_RECIPE_KEYS | dict(found))), st.sampled_from(_YAMLS))


def _check_recipe(bases: Bases, work: Path, example: tuple[str, str]) -> None:
    text, yaml = example
    work.mkdir(exist_ok=True)
    (work / "recipe.yaml").write_bytes(yaml.encode("utf-8", "surrogateescape"))
    before, found = Path.cwd(), []
    os.chdir(work)
    try:
        refused(lambda: found.append(parse_recipe(text).shape(64)))
    finally:
        os.chdir(before)
    for shape in found:
        assert 0 < shape.active_width <= 64
        assert shape.top_k <= shape.experts


def _recipes(bases: Bases) -> Sampled:
    numbers = st.integers(-2, 70) | st.sampled_from([10**30])
    notation = st.builds("S{}A{}E{}".format, numbers, numbers, numbers)
    overlapping = st.builds("S{}A{}E{}N{}".format, numbers, numbers, numbers, numbers)
    papers = st.builds("{}R{}E{}K".format, numbers, numbers, numbers)
    texts = st.one_of(
        st.just("recipe.yaml"),
        st.just("recipe.yaml"),
        st.sampled_from(_RECIPES),
        notation,
        overlapping,
        papers,
        _Strings,
    )
    return st.tuples(texts, _yamls())


def _options(bases: Bases) -> Sampled:
    def of(options: dict[str, tuple[str, ...]]) -> Sampled:
        one = st.sampled_from(list(options)).flatmap(
            lambda name: st.tuples(st.just(name), st.sampled_from(options[name]))
        )
        return st.lists(one, min_size=1, max_size=2, unique_by=lambda pair: pair[0]).map(tuple)

    factorizes = st.tuples(st.just("factorize"), st.sampled_from(["llama"] * 9 + list(_MODELS)), of(_OF_FACTORIZE))
    others = st.sampled_from(list(_OF_OTHERS)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(["good"] * 6 + list(_MODELS)), of(_OF_OTHERS[name]))
    )
    return st.one_of(factorizes, others, others)


def _check_options(bases: Bases, work: Path, example: tuple) -> None:
    command, model, options = example
    fresh_copy(bases.folder("llama"), work)
    for name, content in (("file", "x"), ("file.gguf", "GGUF"), ("full/mine", "x"), ("recipe.yaml", "shared: 2")):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(content)
    (work / "empty").mkdir()
    for name in ("text.txt", "\udcff.txt"):
        (work / name).write_bytes(bases.folder("text.txt").read_bytes())
    shutil.copytree(bases.folder("llama"), work / "\udcff")
    kept = [work / name for name in ("llama", "file", "file.gguf", "full", "text.txt", "recipe.yaml")]
    given_inputs = [*kept, bases.folder("students"), bases.folder("llama"), bases.folder("gguf")]
    before, here = digest(*given_inputs), Path.cwd()
    made = work / dict(options).get("-o", "new") / "config.json"
    was_there = os.path.exists(made)  # which says no to a name that is too long
    os.chdir(work)
    try:
        ended = run(*_command(bases, command, model, dict(options)))
    finally:
        os.chdir(here)
    check_end(ended)
    assert digest(*given_inputs) == before, "an input was changed"
    if command in _MUST_REFUSE:
        assert ended.code == 2
    if command == "factorize":
        assert ended.code == 0 or was_there or not os.path.exists(made)


def _command(bases: Bases, command: str, model: str, options: dict[str, str]) -> list[object]:
    """A whole command line: what is not among the options is as it should be."""
    student, dense = bases.folder("students/sparse"), bases.folder("llama")
    usual: dict[str, dict] = {
        "factorize": {"-o": "new", "--text": "text.txt", "--tokens": 64, "--device": "cpu", "--no-baseline": None},
        "sample": {"-o": "new.jsonl", "--tokens": 32, "--device": "cpu"},
        "trim": {"-o": "new", "--text": "text.txt", "--vocabulary": 260, "--tokens": 64},
        "export": {"-o": "new.gguf"},
        "heal": {"--teacher": dense, "-o": "new", "--tokens": 0},
        "eval": {"--tasks": "", "--device": "cpu"},
        "report": {"-o": "new", "--scores": "file"},
        "bench": {"--against": dense, "-o": "file"},
        "serve": {},
    }
    good = {"sample": dense, "trim": dense, "heal": student, "bench": dense, "serve": "nowhere"}.get(command, student)
    subject = good if model == "good" else bases.folder("students/prune") if model == "prune" else model
    words = [command] if command else []
    if command in ("hosts", "no-such-command", ""):
        subject = None
    words += [subject] if subject is not None else []
    for name, value in (usual.get(command, {}) | options).items():
        words += [word for word in (name, value) if word not in (None, "") or (word == "" and name and word is value)]
    return words


# ---------------------------------------------------------------- students

_MADE = {
    ("format",): (0, 2, "1", None),
    ("recipe", "parts"): (0, 3, 64, "8"),
    ("recipe", "active"): (0, 7),
    ("recipe", "overlapping"): (3, 1),
    ("recipe", "more"): (1,),
    ("settings", "length"): (0, 7, 10**6, "32"),
    ("settings", "seed"): (-1, 2**70),
    ("settings", "dtype"): ("float64", None),
    ("settings", "device"): ("abacus",),
    ("settings", "held_out_tokens"): (0, 10**9),
    ("settings", "more"): (1,),
    ("base_model", "fingerprint"): ("", None),
    ("base_model", "name"): ("", None, "[bold]", 7),
    ("results", "dense"): (MISSING, None, {}),
    ("results", "dense", "perplexity"): (0, -1, None, "x", float("nan")),
    ("results", "student"): (MISSING, None),
    ("results", "another"): ({}, {"perplexity": 1.0}),
    ("results", "dense", "more"): (1,),
    ("layers",): ([], None, [{}]),
    ("layers", 0, "expert_load"): ([], None, ["x"], [0.5]),
    ("layers", 0, "router_agreement"): (None, "x"),
    ("layers", 0, "stream_error"): (None, "x", float("nan")),
    ("data",): (MISSING, None),
    ("data", "calibration_tokens"): (None, -1, "x"),
    ("data", "origin"): (None, "[/]", 7),
    ("engines",): (None, "x", []),
    ("host",): (None, 7, "no-such"),
    ("healing",): (None, {}, {"curve": []}, {"curve": [{"step": 1}]}),
}
_STUDENT_CONFIG = {
    ("num_experts_per_tok",): (0, 1, 7, None, "2"),
    ("num_local_experts",): (0, 5, 7, None),
    ("shared_intermediate_size",): (0, 8, None),
    ("logits_scaling",): (0, 2.0, None),
    ("attention_multiplier",): (2.0, None),
    ("model_type",): ("llama", "mixtral", "no-such", MISSING),
    ("vocab_size",): (1, 265),
    ("rope_parameters",): _ROPES,
    ("auto_map",): ({"AutoConfig": "x.X"},),
}


def _students(bases: Bases) -> Sampled:
    made, partition = (
        bases.json("students/sparse/factorllm.json"),
        bases.json("students/sparse/factorllm.partition.json"),
    )
    config = bases.json("students/sparse/config.json")
    likely_partition = {(0,): ([], None, [0] * 64), (0, 0): (-1, 64, 1, 0.5, None), (1,): (MISSING,)}
    files = {
        "factorllm.json": edits_of(made, _MADE),
        "factorllm.partition.json": edits_of(partition, likely_partition),
        "config.json": edits_of(config, _STUDENT_CONFIG),
    }
    edited = [
        edits.map(lambda found, name=name: InJson(name, found)) | damage_of(name) for name, edits in files.items()
    ]
    shards = sorted(path.name for path in bases.folder("students/sparse").glob("model-*.safetensors"))
    weights = st.sampled_from(shards).flatmap(functools.partial(damage_of, header=300))
    others = st.sampled_from([_INDEX, "tokenizer.json", "generation_config.json", "README.md"]).flatmap(damage_of)
    changes = st.one_of(*edited, edited[0], weights, others)
    commands = st.sampled_from(["inspect"] * 6 + ["prompt"] * 3 + ["export"] * 3 + ["eval"] * 2 + ["report", "heal"])
    return st.tuples(st.sampled_from(["sparse", "sparse", "prune"]), changes, commands)


def _check_student_file(bases: Bases, work: Path, example: tuple) -> None:
    name, change, command = example
    student, out = fresh_copy(bases.folder(f"students/{name}"), work), work / "out"
    if not isinstance(change, InJson) or (student / change.name).exists():
        change.apply(student)
    before = digest(student)
    ended = run(*_student_command(bases, command, student, out))
    assert digest(student) == before, "an input was changed"
    check_end(ended)
    if ended.code:
        assert not out.exists()
    elif command == "export":
        assert gguf.GGUFReader(out).tensors


def _student_command(bases: Bases, command: str, student: Path, out: Path) -> list[object]:
    text, dense = bases.folder("text.txt"), bases.folder("llama")
    return {
        "inspect": ["inspect", student],
        "prompt": ["inspect", student, "--prompt", "the router"],
        "export": ["export", student, "-o", out, "--type", "f32"],
        "eval": ["eval", student, "--tasks", "", "--text", text, "--against", dense],
        "report": ["report", student, "-o", out],
        "heal": ["heal", student, "--teacher", dense, "-o", out, "--text", text, "--tokens", 64, "--device", "cpu"],
    }[command]


def _check_student_read(bases: Bases, work: Path, example: tuple) -> None:
    name, change, _ = example
    student = fresh_copy(bases.folder(f"students/{name}"), work)
    if not isinstance(change, InJson) or (student / change.name).exists():
        change.apply(student)
    shape = parse_recipe("S2A2E8" if name == "sparse" else "S4A0E8").shape(64)
    refused(lambda: read_provenance(student))
    refused(lambda: read_partitions(student, shape))


def _measurements(bases: Bases) -> Sampled:
    score = ("scores", "student", "copa")
    scores = {
        (*score, "value"): (None, "x", float("nan"), -1),
        (*score, "error"): (None, "N/A"),
        (*score, "more"): (1,),
        ("scores", "student"): (MISSING, {}, None, []),
        ("scores", "dense"): (MISSING, {}, None),
        ("scores", "student", "no-such-task"): ({"value": 1, "error": 0, "questions": 1},),
    }
    first = ("models", 0)
    speed = {
        (*first, "name"): (MISSING, None, "another", 7),
        (*first, "ratio_to_dense"): (MISSING, {}, None),
        (*first, "ratio_to_dense", "decode x1"): ([], None, 1.0, ["x"], [0], [-1], [float("nan")]),
        ("models",): ([], None, {}),
    }
    found = [
        edits_of(bases.json(name), likely).map(lambda edits, name=name: InJson(name, edits)) | damage_of(name)
        for name, likely in (("scores.json", scores), ("speed.json", speed))
    ]
    return st.one_of(found)


def _check_measurements(bases: Bases, work: Path, change) -> None:
    fresh_copy(bases.folder("gguf/llama"), work)
    for name in ("scores.json", "speed.json"):
        (work / name).write_bytes(bases.folder(name).read_bytes())
    change.apply(work)
    files = ("--scores", work / "scores.json", "--speed", work / "speed.json")
    ended = run("report", bases.folder("students/sparse"), "-o", work / "out", *files)
    check_end(ended)
    assert ended.code == 0 or not (work / "out").exists()


# ---------------------------------------------------------------- the tests

KINDS = {
    "config": Kind(330, _configs, _check_read_folder),
    "config-factorized": Kind(150, _configs, _check_factorized_folder),
    "weights": Kind(190, _weights, _check_read_folder),
    "weights-factorized": Kind(80, _weights, _check_factorized_folder),
    "tokenizer": Kind(170, _tokenizers, _check_read_tokenizer),
    "tokenizer-factorized": Kind(60, _tokenizers, _check_factorized_folder),
    "tokenizer-trimmed": Kind(30, _tokenizers, _check_trimmed_folder),
    "gguf": Kind(190, _ggufs, _check_read_gguf),
    "gguf-factorized": Kind(70, _ggufs, _check_factorized_gguf),
    "text": Kind(180, _texts, _check_read_text),
    "text-factorized": Kind(50, _texts_with_enough, _check_factorized_text),
    "recipe": Kind(100, _recipes, _check_recipe),
    "options": Kind(200, _options, _check_options),
    "student": Kind(70, _students, _check_student_read),
    "student-commands": Kind(110, _students, _check_student_file),
    "measurements": Kind(20, _measurements, _check_measurements),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


def fuzz(kind: Kind, inputs: int, bases: Bases, work: Path, **how) -> None:
    """Draw a kind's share of so many inputs, and check each."""

    @settings(max_examples=max(inputs * kind.share // IN_ALL, 1), deadline=None, database=None, **how)
    @given(kind.examples(bases))
    def each(example) -> None:
        kind.check(bases, work, example)

    with bounded_memory():
        each()


def test_the_shares_add_up():
    assert sum(kind.share for kind in KINDS.values()) == IN_ALL


@pytest.mark.parametrize("name", KINDS)
def test_damaged_inputs(name, bases, tmp_path):
    inputs = int(os.environ.get("FACTORLLM_FUZZ", IN_CI))
    fuzz(
        KINDS[name],
        inputs,
        bases,
        tmp_path / "work",
        derandomize=True,
        # What is drawn is small as it is: at most three edits.
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_inputs_that_no_one_has_seen(name, bases, tmp_path):
    inputs = int(os.environ.get("FACTORLLM_FUZZ", SLOWLY))
    fuzz(KINDS[name], inputs, bases, tmp_path / "work", print_blob=True, suppress_health_check=list(HealthCheck))


_TOO_LONG = "x" * 5000


@pytest.mark.engine
@pytest.mark.parametrize(
    "words",
    [
        ("serve", _TOO_LONG),
        ("chat", _TOO_LONG),
        ("export", _TOO_LONG, "-o", "new.gguf"),
        ("bench", "STUDENT", "--against", _TOO_LONG),
        ("chat", "STUDENT", "--against", _TOO_LONG),
        *(
            ("serve", "STUDENT", option, _TOO_LONG)
            for option in ("--retrieval", "--lossless", "--dense-prompt", "--mmproj")
        ),
    ],
    ids=lambda words: " ".join(word for word in words if word != _TOO_LONG),
)
def test_a_name_that_no_path_can_have_is_refused(words, bases):
    ended = run(*(bases.folder("students/sparse") if word == "STUDENT" else word for word in words))
    check_end(ended)
    assert "it is no path that can be there" in ended.err


@pytest.mark.engine
def test_a_path_that_is_no_utf_8_can_be_said(bases, tmp_path, monkeypatch):
    shutil.copytree(bases.folder("llama"), tmp_path / "\udcff")
    monkeypatch.chdir(tmp_path)
    ended = run("serve", "\udcff", "--type", "q9")
    assert ended.code == 2
    assert ended.err.startswith("error: \\udcff cannot be used ('utf-8' codec")
