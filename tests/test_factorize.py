"""End to end on a tiny model, through the public interface."""

import json
import math
from typing import get_args

import pytest
import torch
from conftest import CHAT_TEMPLATE, CONFIGS, SMALL, relative_error, save_dense, some_tokens
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from factorllm import Recipe, factorize, parse_recipe
from factorllm.convert.partition import METHODS
from factorllm.recipe import RouterName
from factorllm.report import model_card
from factorllm.text import read_calibration_text

WITH_BASELINE = SMALL.model_copy(update={"baseline": True})


def contents(folder) -> dict[str, bytes]:
    """All files but the one that says how long it took."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "factorllm.run.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, dense_folder, text_file):
    out = tmp_path_factory.mktemp("made") / "student"
    return factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=WITH_BASELINE)


def test_the_output_is_a_complete_checkpoint(made):
    model = AutoModelForCausalLM.from_pretrained(made.out)
    assert model.config.model_type == "granitemoeshared"
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(made.out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(made.out).eos_token_id == 257
    assert not made.out.with_name("student.partial").exists()
    output = model.generate(**tokenizer("expert router", return_tensors="pt"), max_new_tokens=5)
    assert output.shape[1] > 13


def test_saved_and_reloaded_logits_are_identical(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made.out)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = some_tokens(model.config)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_measured_numbers_are_in_the_output(made):
    provenance = json.loads((made.out / "factorllm.json").read_text())
    assert provenance["recipe"]["shared"] == 2
    assert provenance["data"]["calibration_tokens"] == SMALL.tokens
    assert len(provenance["layers"]) == 3
    assert all(0 <= layer["router_agreement"] <= 1 for layer in provenance["layers"])
    assert all(sum(layer["expert_load"]) == pytest.approx(2, abs=1e-4) for layer in provenance["layers"])
    assert set(provenance["results"]) == {"dense", "student", "pruned"}
    assert provenance["results"]["student"]["active_parameters"] < provenance["results"]["dense"]["active_parameters"]
    card = (made.out / "README.md").read_text()
    assert f"{made.row('student').perplexity:.2f}" in card
    assert "tiny-llama" in card


def card_of(made, recipe=None, tune=0, **changes):
    """The card of a student, had it been made so."""
    found = json.loads((made.out / "factorllm.json").read_text())
    found["settings"]["tune"] = tune
    if recipe:
        found["recipe"] = parse_recipe(recipe).model_dump()
    return " ".join(model_card("name", found | changes, None).split())


def test_a_card_says_what_was_done_and_nothing_else(made):
    card = card_of(made)
    assert "each FFN was split into experts, given a router fitted to the dense FFN, and repaired in closed" in card
    assert "(2 of 8 parts of each FFN always run, 2 of the other 6 are chosen for each token)" in card
    assert "No gradient step was taken" in card
    assert "The static prune keeps" in card

    tuned = card_of(made, tune=2)
    assert "No gradient step" not in tuned
    assert "given a router fitted to the dense FFN, fitted by gradient to the dense model's layers" in tuned
    assert "each FFN but the first 1 was split" in card_of(made, "S2A2E8D1")
    overlapping = (
        "(0 of 8 parts of each FFN always run, one of 3 overlapping experts of 4 parts is chosen for each token)"
    )
    assert overlapping in card_of(made, "S0A4E8N3")

    alone = {
        name: json.loads((made.out / "factorllm.json").read_text())["results"][name] for name in ("dense", "student")
    }
    pruned = card_of(made, "S4A0E8", host="dense", results=alone, layers=[])
    assert "each FFN was cut to 4 of 8 equal parts, and repaired in closed form." in pruned
    assert "Architecture: the dense model's own" in pruned
    for word in ("mixture-of-experts", "expert", "router", "static prune", "chosen"):
        assert word not in pruned

    data = json.loads((made.out / "factorllm.json").read_text())["data"]
    kind = card_of(made, "S4A0E8", host="dense", layers=[], data=data | {"kinds_of": "0"})
    assert "each FFN was cut to 4 of 8 equal parts, for one kind of text of several, and repaired" in kind
    assert f"Perplexity on {data['held_out_tokens']} held-out tokens of that kind of text. The static prune is" in kind
    assert "repaired from the same tokens, all of which counted alike." in kind

    healing = {"tokens": 99, "held_out_tokens": 77, "text": "other.txt", "settings": {"train": "all"}}
    healed = card_of(made, healing=healing)
    assert "Perplexity on 77 held-out tokens of the text of healing." in healed
    assert "Before it was healed, the routers' picks agreed" in healed


def test_the_perplexity_is_that_of_the_written_checkpoint(made, dense_folder, text_file, small):
    tokenizer = AutoTokenizer.from_pretrained(made.out)
    text = read_calibration_text(str(text_file), tokenizer, small)
    for folder, name in ((made.out, "student"), (dense_folder, "dense")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            losses = [model(row[None], labels=row[None]).loss.item() for row in text.held_out]
        assert math.exp(sum(losses) / len(losses)) == pytest.approx(made.row(name).perplexity, rel=1e-4)


def test_restore_brings_the_student_nearer_to_the_dense_model(dense_folder, text_file, small, tmp_path):
    summaries = {
        kind: factorize(
            str(dense_folder),
            tmp_path / kind,
            Recipe(shared=1, active=1, parts=4, restore=kind),
            text=str(text_file),
            settings=small,
        )
        for kind in ("none", "local", "stream")
    }
    errors = {kind: summary.layers[-1]["stream_error"] for kind, summary in summaries.items()}
    assert errors["stream"] < errors["local"] < errors["none"]


def test_the_final_norm_carries_the_logit_scale(made, dense_folder, text_file, small, tmp_path):
    bare = Recipe(shared=2, active=2, parts=8, restore="none")
    unrestored = factorize(str(dense_folder), tmp_path / "bare", bare, text=str(text_file), settings=small)
    dense, restored, bare = (
        AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
        for folder in (dense_folder, made.out, unrestored.out)
    )
    assert 0.25 < made.logit_scale < 1
    torch.testing.assert_close(restored, dense * made.logit_scale)
    assert unrestored.logit_scale == 1
    assert torch.equal(bare, dense)


@pytest.mark.parametrize("method", METHODS)
def test_every_partition_makes_a_model(method, dense_folder, text_file, small, tmp_path):
    recipe = Recipe(shared=1, active=1, parts=4, partition=method)
    summary = factorize(str(dense_folder), tmp_path / "out", recipe, text=str(text_file), settings=small)
    assert summary.row("student").perplexity > 1


@pytest.mark.parametrize("router", get_args(RouterName))
@pytest.mark.parametrize("prior", ["energy", "paper"])
def test_every_router_makes_a_model(router, prior, dense_folder, text_file, small, tmp_path):
    recipe = Recipe(shared=0, active=2, parts=4, router=router, prior=prior)
    summary = factorize(str(dense_folder), tmp_path / "out", recipe, text=str(text_file), settings=small)
    assert summary.host == "mixtral"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dense_folder, text_file, tmp_path, made):
    factorize(str(dense_folder), tmp_path / "a" / "student", "S2A2E8", text=str(text_file), settings=WITH_BASELINE)
    assert contents(tmp_path / "a" / "student") == contents(made.out)
    other = SMALL.model_copy(update={"seed": 1})
    factorize(str(dense_folder), tmp_path / "b" / "student", "S2A2E8", text=str(text_file), settings=other)
    assert contents(tmp_path / "b" / "student") != contents(made.out)


def test_activations_spilled_to_disk_change_nothing(dense_folder, text_file, tmp_path, made):
    spilling = WITH_BASELINE.model_copy(update={"memory_limit": 0})
    factorize(str(dense_folder), tmp_path / "student", "S2A2E8", text=str(text_file), settings=spilling)
    shards = {name: data for name, data in contents(tmp_path / "student").items() if name.endswith(".safetensors")}
    assert shards == {name: data for name, data in contents(made.out).items() if name.endswith(".safetensors")}


def test_a_sharded_bf16_model_keeps_its_dtype(text_file, small, tmp_path):
    dense = save_dense(CONFIGS["gqa-untied"], tmp_path / "dense")
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 1
    (tmp_path / "dense" / "model.safetensors").unlink(missing_ok=True)
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_text_sampled_from_the_model_itself(dense_folder, small, tmp_path):
    few = small.model_copy(update={"tokens": 1024, "held_out_tokens": 128})
    summary = factorize(str(dense_folder), tmp_path / "out", "S2A2E8", settings=few)
    assert summary.text_origin == "sampled from the dense model itself"
    assert "sampled from the dense model itself" in (tmp_path / "out" / "README.md").read_text()


def test_a_static_prune_is_a_narrower_dense_model(dense_folder, text_file, small, tmp_path):
    summary = factorize(str(dense_folder), tmp_path / "out", "S4A0E8", text=str(text_file), settings=small)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.model_type, model.config.intermediate_size) == ("llama", 32)
    assert [row.name for row in summary.rows] == ["dense", "student"]


def test_the_baseline_is_the_static_prune_made_alone(dense_folder, text_file, small, tmp_path, made):
    alone = factorize(str(dense_folder), tmp_path / "out", "S4A0E8", text=str(text_file), settings=small)
    assert alone.row("student").perplexity == made.row("pruned").perplexity


def test_the_student_computes_what_its_router_picks(made, dense_folder):
    """Reference in plain tensors: shared neurons and the picked experts' neurons of the written weights."""
    model = AutoModelForCausalLM.from_pretrained(made.out, dtype=torch.float32)
    moe, shared = model.model.layers[0].block_sparse_moe, model.model.layers[0].shared_mlp
    x = torch.randn(20, model.config.hidden_size)
    logits = x @ moe.router.weight.T
    top = logits.topk(2, dim=1)
    gates = top.values.softmax(dim=1)
    wanted = shared(x[None])[0]
    for token in range(20):
        for gate, expert in zip(gates[token], top.indices[token], strict=True):
            gate_rows, up_rows = moe.experts.gate_up_proj[expert].chunk(2)
            hidden = torch.nn.functional.silu(gate_rows @ x[token]) * (up_rows @ x[token])
            wanted[token] += gate * (moe.experts.down_proj[expert] @ hidden)
    with torch.no_grad():
        got = moe(x[None])[0] + shared(x[None])[0]
    assert relative_error(got, wanted) < 1e-5
