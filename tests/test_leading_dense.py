"""The FFNs of a student's first layers may stay whole: in its files, cost and healing, and in GGUF files."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from conftest import CONFIGS, relative_error, save_dense, some_tokens
from families import TINY
from test_export import factorized
from test_families import ASKED
from test_heal import tensors
from test_hosts import build
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError, HealSettings, Recipe, factorize, heal, parse_recipe
from factorllm.dense.families import leading_dense
from factorllm.exporting import export_gguf
from factorllm.healing.targets import ask
from factorllm.hosts import choose_host
from factorllm.runs.settings import Settings
from factorllm.student.read import PARTITION_FILE, read_partitions

SETTINGS = Settings(tokens=2048, held_out_tokens=512, length=64)
LAYERS = CONFIGS["qwen3"].num_hidden_layers


@pytest.fixture(scope="module")
def made(text_file, tmp_path_factory):
    """A folder with a dense model, its student with one whole FFN, and what `factorize` said of it."""
    folder = tmp_path_factory.mktemp("made")
    save_dense(CONFIGS["qwen3"], folder / "dense")
    summary = factorize(str(folder / "dense"), folder / "out", "S2A2E8D1", text=str(text_file), settings=SETTINGS)
    return folder, summary


@pytest.mark.parametrize("name", ["gqa-tied", "qwen2", "qwen3", "mistral"])
def test_all_experts_on_equals_dense(name, tmp_path, text_file):
    recipe = Recipe(shared=2, active=6, parts=8, dense=2, restore="none")
    dense, student = build(CONFIGS[name], recipe, tmp_path, text_file, SETTINGS)
    tokens = some_tokens(CONFIGS[name])
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


def test_the_first_ffn_is_the_dense_models_and_the_others_are_cut(made):
    folder, summary = made
    dense, student = tensors(folder / "dense"), tensors(folder / "out")
    first = {name for name in dense if name.startswith("model.layers.0.")}
    assert first == {name for name in student if name.startswith("model.layers.0.")}
    assert all(torch.equal(dense[name], student[name]) for name in first)
    assert "model.layers.1.mlp.gate.weight" in student
    assert [entry["layer"] for entry in summary.layers] == list(range(1, LAYERS))
    assert len(json.loads((folder / "out" / PARTITION_FILE).read_text())) == LAYERS - 1
    config = AutoModelForCausalLM.from_pretrained(folder / "out").config
    assert leading_dense(config) == config.first_k_dense_replace == 1


def test_its_cost_counts_the_whole_ffn(made):
    _, summary = made
    dense, student, pruned = (row.cost for row in summary.rows)
    assert student.ffn_sparsity == pytest.approx(0.5 * (LAYERS - 1) / LAYERS)
    half = 3 * CONFIGS["qwen3"].hidden_size * CONFIGS["qwen3"].intermediate_size // 2
    routers = (LAYERS - 1) * 6 * CONFIGS["qwen3"].hidden_size
    assert student.active_parameters == pruned.active_parameters + half + routers
    assert student.active_parameters == dense.active_parameters - (LAYERS - 1) * half + routers


def test_healing_learns_from_the_ffns_that_are_cut(made, text_file, tmp_path):
    folder, _ = made
    settings = HealSettings(
        tokens=2048, validation_tokens=512, batch=4, micro_batch=2, evaluations=2, precision="float32"
    )
    heal(folder / "out", str(folder / "dense"), tmp_path / "healed", text=str(text_file), settings=settings)
    told = json.loads((tmp_path / "healed" / "factorllm.json").read_text())["healing"]
    assert told["curve"][-1]["eval_loss"] <= told["curve"][0]["eval_loss"]


def test_the_teacher_says_what_matters_in_the_ffns_that_are_cut(made):
    folder, _ = made
    splits = read_partitions(folder / "out", parse_recipe("S2A2E8D1").shape(CONFIGS["qwen3"].intermediate_size))
    assert len(splits) == LAYERS - 1
    teacher, tokens = AutoModelForCausalLM.from_pretrained(folder / "dense"), some_tokens(CONFIGS["qwen3"])
    cut, all_of_them = (
        ask(teacher, tokens, replace(ASKED, partitions=partitions))["priors"]
        for partitions in (splits, [splits[0], *splits])
    )
    assert torch.equal(cut, all_of_them[..., 1:, :])


@pytest.mark.engine
def test_a_gguf_file_holds_the_whole_ffn_and_is_weighted_by_the_text(text_file, tmp_path):
    student = factorized(CONFIGS["qwen3"], tmp_path, text_file, SETTINGS, "S2A2E8D1")
    written = export_gguf(str(student), tmp_path / "out.gguf", "q8_0", text=str(text_file), tokens=256)
    reader = gguf.GGUFReader(written.path)
    assert reader.fields["glm4moe.leading_dense_block_count"].contents() == 1
    ffn = {tensor.name for tensor in reader.tensors if tensor.name.startswith("blk.0.ffn")}
    assert ffn == {f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")}
    weighted = {tensor.name.removesuffix(".in_sum2") for tensor in gguf.GGUFReader(written.importance).tensors}
    assert ffn < weighted


@pytest.mark.parametrize(
    ("recipe", "family", "host", "says"),
    [
        ("S0A2E8D1", "qwen3", "qwen3_moe", "all its layers have experts"),
        (f"S2A2E8D{LAYERS}", "qwen3", "glm4_moe", f"of {LAYERS} layers at least one must have experts"),
        ("S2A2E8D1", "phi3", "glm4_moe", "in whole FFNs it holds gate and up apart"),
    ],
)
def test_what_no_host_can_hold_is_refused(recipe, family, host, says):
    config = {**TINY, **CONFIGS}[family]
    with pytest.raises(FactorLLMError, match=says):
        choose_host(host, config, parse_recipe(recipe).shape(config.intermediate_size))


def test_a_prune_has_one_width():
    with pytest.raises(FactorLLMError, match="in a static prune all FFNs are of one width"):
        parse_recipe("S4A0E8D1")
    assert parse_recipe("S0A4E8N3D2").name == "S0A4E8N3D2"
    assert parse_recipe("s2a2e8d1") == Recipe(shared=2, active=2, parts=8, dense=1)
    assert parse_recipe("S2A2E8D1").static_prune() == Recipe(shared=4, active=0, parts=8)
