"""Dense models are read as their files say: what a GGUF file computes in llama.cpp, what a folder computes in
transformers, or a refusal that names what is not applied."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ATTENTION_BIAS, BASE, CONFIGS, edit_json, relative_error, save_dense, some_tokens
from families import TINY
from safetensors.torch import load_file, save_file
from test_export import byte_level_tokenizer, save_model, sentencepiece_tokenizer
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from factorllm import FactorLLMError, factorize
from factorllm.dense import open_model
from factorllm.dense.layer import DenseLayer
from factorllm.engines import EngineProcess, Options
from factorllm.exporting import export_gguf
from factorllm.runs.settings import Settings

CPU = torch.device("cpu")
FEW = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | more}


LINEAR = rope("linear", factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ODD_LLAMA3 = rope("llama3", factor=6.0, low_freq_factor=1.0, high_freq_factor=9.0, original_max_position_embeddings=900)

WRITTEN = {
    "llama-linear": LlamaConfig(**BASE, **LINEAR),
    "llama-yarn": LlamaConfig(**BASE, **YARN),
    "llama3": LlamaConfig(**BASE, **LLAMA3),
    "llama3-odd": LlamaConfig(**BASE | {"hidden_size": 128, "head_dim": 32}, **ODD_LLAMA3),
    "llama-bias": ATTENTION_BIAS,
    "llama-head-dim": LlamaConfig(**BASE | {"head_dim": 16}),
    "mistral": MistralConfig(**BASE | {"sliding_window": None}, **YARN),
    "qwen2-yarn": Qwen2Config(**BASE, **YARN),
    "qwen2-linear": Qwen2Config(**BASE, **LINEAR),
    "qwen3-yarn": Qwen3Config(**BASE | {"head_dim": 16}, **YARN),
    "qwen3-head-dim": Qwen3Config(**BASE | {"head_dim": 32}),
    "yarn-all-said": LlamaConfig(
        **BASE, **rope("yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.5)
    ),
}
"""Dense models that our writer makes GGUF files of."""


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, tmp_path_factory) -> tuple[Path, Path]:
    """A dense folder, and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("written") / request.param
    save_model(WRITTEN[request.param], folder)
    export_gguf(str(folder), folder.with_suffix(".gguf"), "f32")
    return folder, folder.with_suffix(".gguf")


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_a_gguf_file_is_read_as_the_folder_that_it_was_written_from(written):
    folder, file = written
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = some_tokens(dense.config)
    assert (
        relative_error(
            logits_of(open_model(str(file)).load_model(torch.float32, CPU), tokens), logits_of(dense, tokens)
        )
        < 1e-5
    )


@pytest.mark.engine
def test_a_gguf_file_is_read_as_llamacpp_reads_it(written):
    _, file = written
    model = open_model(str(file)).load_model(torch.float32, CPU)
    tokens = some_tokens(model.config, rows=1)
    ours = logits_of(model, tokens)[0, -1].double().log_softmax(-1)
    with EngineProcess("llamacpp", file, Options(context=64)) as engine:
        errors = [abs(ours[i].item() - log_prob) for i, log_prob in engine.next_tokens(tokens[0].tolist(), 20)]
    assert sum(errors) / len(errors) < 0.02  # llama.cpp keeps keys and values in fp16


def rewrite(source: Path, target: Path, drop: tuple[str, ...] = (), **changes) -> None:
    """Another GGUF file with some keys changed, and keys or tensors left out."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop or key in changes:
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in changes.items():
        kinds.get(type(value), writer.add_array)(key, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "dense"
    save_model(CONFIGS["gqa-tied"], folder)
    export_gguf(str(folder), folder.with_suffix(".gguf"), "f32")
    return folder.with_suffix(".gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama__attention__scale", 0.5),
        ("llama__attn_logit_softcapping", 30.0),
        ("llama__final_logit_softcapping", 30.0),
        ("llama__expert_count", 8),
        ("llama__attention__sliding_window", 16),
        ("llama__attention__causal", False),
        ("llama__rope__dimension_count", 4),
        ("llama__rope__scaling__type", "longrope"),
        ("llama__rope__scaling__attn_factor", 2.0),
        ("llama__attention__value_length", 16),
        ("llama__something_new", 1),
    ],
)
def test_a_key_that_is_not_applied_is_refused_by_name(plain, tmp_path, key, value):
    rewrite(plain, tmp_path / "odd.gguf", **{key: value})
    with pytest.raises(FactorLLMError, match=key.replace("__", ".")):
        open_model(str(tmp_path / "odd.gguf"))


@pytest.mark.parametrize(
    ("key", "value"), [("yarn_beta_fast", 8.0), ("yarn_beta_slow", 0.5), ("yarn_attn_factor", 1.5)]
)
def test_what_llamacpp_does_not_heed_of_yarn_is_refused(tmp_path, key, value):
    save_model(WRITTEN["llama-yarn"], tmp_path / "dense")
    export_gguf(str(tmp_path / "dense"), tmp_path / "file.gguf", "f32")
    rewrite(tmp_path / "file.gguf", tmp_path / "odd.gguf", **{f"llama__rope__scaling__{key}": value})
    with pytest.raises(FactorLLMError, match=rf"rope\.scaling\.{key} = {value}"):
        open_model(str(tmp_path / "odd.gguf"))


def test_what_scales_attention_in_all_layers_of_gemma_3_is_refused(tmp_path):
    """transformers would scale it in layers without a window only."""
    save_model(TINY["gemma3_text"], tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config["rope_parameters"]["full_attention"] |= YARN["rope_parameters"]
    config["layer_types"] = ["sliding_attention"] * 3  # as llama.cpp has it in so few layers
    edit_json(tmp_path / "dense/config.json", **config)
    export_gguf(str(tmp_path / "dense"), tmp_path / "file.gguf", "f32")
    assert open_model(str(tmp_path / "file.gguf")).config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    rewrite(tmp_path / "file.gguf", tmp_path / "odd.gguf", gemma3__rope__scaling__attn_factor=1.5)
    with pytest.raises(FactorLLMError, match=r"rope\.scaling\.attn_factor = 1\.5"):
        open_model(str(tmp_path / "odd.gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama__expert_count", 0), ("llama__attention__causal", True), ("llama__attention__head_count_kv", [2, 2, 2])],
)
def test_a_key_that_changes_nothing_is_fine(plain, tmp_path, key, value):
    rewrite(plain, tmp_path / "same.gguf", **{key: value})
    assert open_model(str(tmp_path / "same.gguf")).config.to_dict() == open_model(str(plain)).config.to_dict()


def test_scaling_by_the_key_of_old_files(plain, tmp_path):
    rewrite(plain, tmp_path / "old.gguf", llama__rope__scale_linear=4.0)
    assert open_model(str(tmp_path / "old.gguf")).config.rope_parameters["factor"] == 4.0


def test_rope_freqs_that_no_scaling_makes_are_refused(written, tmp_path):
    folder, file = written
    if "llama3" not in folder.name:
        pytest.skip("has no rope_freqs")
    rewrite(file, tmp_path / "odd.gguf", drop=("rope_freqs.weight",))
    assert open_model(str(tmp_path / "odd.gguf")).config.rope_parameters["rope_type"] == "default"
    data = bytearray(file.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    data[tensor.data_offset + 2 : tensor.data_offset + 4] = b"\x40\x40"  # the first factor: 3
    (tmp_path / "damaged.gguf").write_bytes(data)
    with pytest.raises(FactorLLMError, match="rope_freqs"):
        open_model(str(tmp_path / "damaged.gguf"))


def test_biases_of_queries_keys_and_values_alone(tmp_path):
    save_model(ATTENTION_BIAS, tmp_path / "dense")
    export_gguf(str(tmp_path / "dense"), tmp_path / "all.gguf", "f32")
    rewrite(tmp_path / "all.gguf", tmp_path / "qkv.gguf", drop=tuple(f"blk.{i}.attn_output.bias" for i in range(3)))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for layer in dense.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    tokens = some_tokens(dense.config)
    read = open_model(str(tmp_path / "qkv.gguf")).load_model(torch.float32, CPU)
    assert relative_error(logits_of(read, tokens), logits_of(dense, tokens)) < 1e-5


def split(source: Path, parts: int) -> list[Path]:
    """The parts of a split model, as llama-gguf-split writes them: all keys in the first."""
    reader = gguf.GGUFReader(source)
    paths = [source.with_name(f"part-{i + 1:05d}-of-{parts:05d}.gguf") for i in range(parts)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                of_items = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], of_items)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_gguf_is_read_from_any_of_its_parts(plain, tmp_path):
    whole = shutil.copy(plain, tmp_path / "whole.gguf")
    paths = split(Path(whole), 3)
    wanted = open_model(str(whole))
    for path in paths:
        found = open_model(str(path))
        assert all(torch.equal(found.tensor(name), wanted.tensor(name)) for name in wanted.names())
        assert found.files == paths
    paths[1].unlink()
    with pytest.raises(FactorLLMError, match=r"part-00002-of-00003\.gguf is not beside it"):
        open_model(str(paths[0]))


def test_a_part_under_another_name_is_refused(plain, tmp_path):
    paths = split(Path(shutil.copy(plain, tmp_path / "whole.gguf")), 2)
    paths[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(FactorLLMError, match="one of 2 parts"):
        open_model(str(tmp_path / "alone.gguf"))


def test_parts_of_two_splits_are_refused(plain, tmp_path):
    """Which of two tensors of one name is the model's nobody knows; llama.cpp does not load them either."""
    paths = split(Path(shutil.copy(plain, tmp_path / "whole.gguf")), 2)
    other = gguf.GGUFWriter(paths[1], "llama")
    other.add_uint16("split.no", 1)
    other.add_uint16("split.count", 2)
    for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors[1:]:
        other.add_tensor(tensor.name, tensor.data * 2)
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(FactorLLMError, match=r"of more than one split: blk\.0\.attn_q\.weight is in two of them"):
        open_model(str(paths[0]))


def test_a_file_of_another_byte_order_is_refused(plain, tmp_path):
    """gguf swaps what its header says, and would read other weights."""
    source = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            of_items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], of_items)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FactorLLMError, match=r"big\.gguf is big-endian.*gguf-convert-endian FILE native"):
        open_model(str(tmp_path / "big.gguf"))


def test_an_unknown_way_of_cutting_text_is_refused(plain, tmp_path):
    rewrite(plain, tmp_path / "odd.gguf", **{"tokenizer.ggml.pre": "superbpe"})
    rewrite(plain, tmp_path / "none.gguf", drop=("tokenizer.ggml.pre",))
    for name in ("odd", "none"):
        with pytest.raises(FactorLLMError, match="cuts text"):
            open_model(str(tmp_path / f"{name}.gguf")).tokenizer()


@pytest.mark.engine
@pytest.mark.parametrize(("name", "begins"), [("tekken", True), ("llama-bpe", True), ("qwen2", False)])
def test_the_token_that_begins_a_text_is_llamacpps_where_the_file_does_not_say(plain, tmp_path, name, begins):
    rewrite(plain, tmp_path / "old.gguf", drop=("tokenizer.ggml.add_bos_token",), tokenizer__ggml__pre=name)
    found = open_model(str(tmp_path / "old.gguf")).tokenizer()
    with EngineProcess("llamacpp", tmp_path / "old.gguf", Options(context=64)) as engine:
        assert found("the expert").input_ids == engine.tokenize("the expert", special=True)
    assert (found("the expert").input_ids[0] == found.bos_token_id) is begins


def test_a_gguf_file_ends_answers_where_llamacpp_does(tmp_path):
    """At what the file says and at what llama.cpp knows by name, as of Gemma 3, which says <eos> alone."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<end_of_turn>"]})
    user, known = tokenizer.convert_tokens_to_ids(["<|user|>", "<end_of_turn>"])
    save_model(LlamaConfig(**BASE | {"eos_token_id": 1}), tmp_path / "dense", tokenizer)
    export_gguf(str(tmp_path / "dense"), tmp_path / "file.gguf", "f32")
    assert open_model(str(tmp_path / "file.gguf")).generation_config().eos_token_id == [1, known]
    rewrite(tmp_path / "file.gguf", tmp_path / "more.gguf", tokenizer__ggml__eot_token_id=user)
    source = open_model(str(tmp_path / "more.gguf"))
    assert (source.config.eos_token_id, source.generation_config().eos_token_id) == (1, [1, user, known])
    export_gguf(str(tmp_path / "more.gguf"), tmp_path / "again.gguf", "f32")
    assert gguf.GGUFReader(tmp_path / "again.gguf").fields["tokenizer.ggml.eot_token_id"].contents() == user


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_the_tokenizer_of_a_gguf_file_is_the_one_that_was_written(tmp_path, make):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save_model(LlamaConfig(**BASE), tmp_path / "dense", tokenizer)
    export_gguf(str(tmp_path / "dense"), tmp_path / "file.gguf", "f32")
    found = open_model(str(tmp_path / "file.gguf")).tokenizer()
    for text in ("the expert  router", "1234 naïve 中文!\n\n<think>of<|im_start|>it's", " x", ""):
        ids = tokenizer(text).input_ids
        assert found(text).input_ids == ids
    assert found.decode(found("the expert  router").input_ids) == "the expert  router"
    assert (found.bos_token, found.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert max(found.get_vocab().values()) < open_model(str(tmp_path / "file.gguf")).config.vocab_size


def all_on(folder: Path, out: Path, text_file: Path, settings) -> torch.Tensor:
    """Logits of a student of which all experts run, which must be those of the dense model."""
    factorize(str(folder), out, "S2A6E8", text=str(text_file), settings=settings)
    student = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return logits_of(student, some_tokens(student.config))


def test_a_head_that_differs_is_kept_whatever_the_flag_says(tmp_path, text_file, small):
    save_dense(CONFIGS["gqa-untied"], tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", tie_word_embeddings=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    got = all_on(tmp_path / "dense", tmp_path / "out", text_file, small)
    assert relative_error(got, logits_of(dense, some_tokens(dense.config))) < 1e-5
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]


def test_a_head_that_is_the_embedding_table_stays_tied(tmp_path):
    save_dense(CONFIGS["gqa-tied"], tmp_path / "dense")
    weights = load_file(tmp_path / "dense/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    assert open_model(str(tmp_path / "dense")).config.tie_word_embeddings


def test_weights_are_found_where_transformers_finds_them(tmp_path):
    folder = tmp_path / "dense"
    save_dense(CONFIGS["gqa-untied"], folder, seed=1, max_shard_size="20KB")
    shards = {path.name: path.read_bytes() for path in folder.glob("model-*")}
    new = save_dense(CONFIGS["gqa-untied"], folder, seed=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(["a"], "gone")}))
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    read = open_model(str(folder)).tensor("lm_head.weight")
    assert torch.equal(read, new.lm_head.weight)


def test_an_index_that_misses_a_tensor_and_misplaces_another(tmp_path):
    folder = tmp_path / "dense"
    save_dense(CONFIGS["gqa-untied"], folder, max_shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    lost, misplaced, *_ = (name for name, shard in weight_map.items() if shard == shards[0])
    del weight_map[lost]
    weight_map[misplaced] = shards[1]
    edit_json(path, weight_map=weight_map)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = some_tokens(dense.config)
    read = open_model(str(folder)).load_model(torch.float32, CPU)
    assert relative_error(logits_of(read, tokens), logits_of(dense, tokens)) < 1e-6


def test_shards_without_their_index_are_not_said_to_be_pickles(tmp_path):
    save_dense(CONFIGS["gqa-untied"], tmp_path / "dense", max_shard_size="60KB")
    (tmp_path / "dense/model.safetensors.index.json").unlink()
    with pytest.raises(
        FactorLLMError, match=r"has model-00001-of-.* nor model\.safetensors\.index\.json.*fetch the whole"
    ):
        open_model(str(tmp_path / "dense"))


def test_an_index_of_other_shards_is_refused(tmp_path):
    save_dense(CONFIGS["gqa-untied"], tmp_path / "dense", max_shard_size="60KB")
    path = tmp_path / "dense/model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {"other.weight": weight_map["lm_head.weight"]})
    with pytest.raises(FactorLLMError, match=r"names other\.weight, which is in none of its files"):
        open_model(str(tmp_path / "dense"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 250}, "model.embed_tokens.weight is 258 x 32"),
        ({"num_key_value_heads": 4}, "k_proj.weight is 16 x 32"),
        ({"intermediate_size": 128}, "gate_proj.weight is 64 x 32"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"sliding_window": [None]}, "sliding_window"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"output_attentions": True}, "output_attentions"),
        ({"return_dict": False}, "return_dict"),
        ({"is_causal": False}, "says is_causal = False, so its tokens see those after them"),
        ({"is_causal": None}, "is_causal = None"),
    ],
)
def test_a_config_that_is_not_applied_is_refused_by_name(tmp_path, changes, named):
    save_dense(CONFIGS["gqa-tied"], tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", **changes)
    with pytest.raises(FactorLLMError, match=named):
        open_model(str(tmp_path / "dense"))


@pytest.mark.parametrize(
    ("family", "said", "otherwise"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}),
        ("hunyuan_v1_dense", {"use_qk_norm": True}, {"use_qk_norm": [True]}),
    ],
)
def test_what_a_family_does_is_no_key_that_is_not_applied(family, said, otherwise, tmp_path):
    """As Phi-4-mini and Hunyuan say it on the hub, where transformers' classes have no such key."""
    save_dense(TINY[family], tmp_path)
    edit_json(tmp_path / "config.json", **said)
    assert open_model(str(tmp_path)).config.model_type == family
    edit_json(tmp_path / "config.json", **otherwise)
    with pytest.raises(FactorLLMError, match=f"{next(iter(said))} = .* is not applied"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "named"), [("sliding_attention", "no sliding_window in use"), ("linear_attention", "linear_attention")]
)
def test_layers_of_another_kind_of_attention_are_refused(tmp_path, kind, named):
    save_dense(CONFIGS["qwen2"], tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", layer_types=[kind] * 3)
    with pytest.raises(FactorLLMError, match=named):
        open_model(str(tmp_path / "dense"))


def test_an_adapter_beside_the_weights_is_refused(tmp_path, dense_folder):
    shutil.copytree(dense_folder, tmp_path / "dense")
    (tmp_path / "dense/adapter_config.json").write_text("{}")
    with pytest.raises(FactorLLMError, match="merge it"):
        open_model(str(tmp_path / "dense"))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_without_a_config_that_says_so_are_refused(tmp_path, dense_folder, kind):
    shutil.copytree(dense_folder, tmp_path / "dense")
    weights = load_file(tmp_path / "dense/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(kind)
    save_file(weights, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FactorLLMError, match="so it is quantised"):
        open_model(str(tmp_path / "dense"))


def test_a_streamed_model_that_is_not_the_one_of_transformers_stops_the_run(
    dense_folder, tmp_path, text_file, small, monkeypatch
):
    after = DenseLayer.after
    monkeypatch.setattr(DenseLayer, "after", lambda layer, *streams: after(layer, *streams) * 1.01)
    with pytest.raises(FactorLLMError, match="layer 0 differ by"):
        factorize(str(dense_folder), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_in_memory_is_compared_in_its_first_layers(
    dense_folder, tmp_path, text_file, small, monkeypatch
):
    monkeypatch.setattr("factorllm.convert.reference.available_memory", lambda: 0)
    attend, seen = DenseLayer.attend, []
    monkeypatch.setattr(DenseLayer, "attend", lambda layer, *given: seen.append(layer) or attend(layer, *given))
    out = tmp_path / "out"
    assert factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=small)
    assert len({id(layer) for layer in seen[:2]}) == 2


@pytest.mark.engine
def test_a_gguf_file_that_llamacpp_computes_otherwise_stops_the_run(plain, tmp_path, text_file, small, monkeypatch):
    read = open_model(str(plain)).__class__._read

    def damaged(source, name):
        return read(source, name) * (1.5 if name.endswith("layers.1.mlp.up_proj.weight") else 1)

    monkeypatch.setattr("factorllm.dense.gguf.file.GGUFSource._read", damaged)
    with pytest.raises(FactorLLMError, match=r"not the model that llama\.cpp computes"):
        factorize(str(plain), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)


@pytest.mark.engine
def test_a_gguf_file_with_which_llamacpp_computes_no_number_is_refused(tmp_path, text_file, small):
    save_model(CONFIGS["gqa-tied"], tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 1e6  # llama.cpp keeps values in fp16
    model.save_pretrained(tmp_path / "dense")
    export_gguf(str(tmp_path / "dense"), tmp_path / "dense.gguf", "f32")
    with pytest.raises(FactorLLMError, match=r"llama\.cpp computes NaN or infinity"):
        factorize(str(tmp_path / "dense.gguf"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)


@pytest.fixture(scope="module")
def student(plain, tmp_path_factory, text_file) -> Path:
    out = tmp_path_factory.mktemp("student") / "out"
    factorize(str(plain.with_suffix("")), out, "S2A2E8", text=str(text_file), settings=FEW)
    return out


def change_tensor(folder: Path, name: str, change) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    weights = load_file(path)
    weights[name] = change(weights[name])
    save_file({key: value for key, value in weights.items() if value is not None}, path, metadata={"format": "pt"})


ROUTER = "model.layers.1.block_sparse_moe.router.layer.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: None, "names"),
        (lambda tensor: tensor[:4].clone(), r"is \(4, 32\), but the config says \(6, 32\)"),
        (lambda tensor: tensor * float("nan"), "NaN or infinite"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "quantised"),
    ],
)
def test_a_damaged_student_is_not_exported(student, tmp_path, change, said):
    shutil.copytree(student, tmp_path / "student")
    change_tensor(tmp_path / "student", ROUTER, change)
    with pytest.raises(FactorLLMError, match=said):
        export_gguf(str(tmp_path / "student"), tmp_path / "out.gguf", "f32")
    assert not list(tmp_path.glob("out.gguf*"))


def test_a_student_with_a_tensor_that_would_be_left_out_is_not_exported(student, tmp_path):
    shutil.copytree(student, tmp_path / "student")
    edit_json(tmp_path / "student/config.json", num_hidden_layers=2)
    with pytest.raises(FactorLLMError, match=r"model\.layers\.2\S+ has no place in it"):
        export_gguf(str(tmp_path / "student"), tmp_path / "out.gguf", "f32")
