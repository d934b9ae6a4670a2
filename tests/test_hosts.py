"""Each host holds the student exactly: with every expert on it is the dense model."""

import pytest
import torch
from conftest import ATTENTION_BIAS, CONFIGS, SLIDING_WINDOW, WIDE_HEADS, relative_error, save_dense, some_tokens
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError, Recipe, factorize, parse_recipe
from factorllm.hosts import choose_host

HOST_OF = {"S0A4E4": "mixtral", "S2A6E8": "granitemoeshared"}


def build(config, recipe, tmp_path, text_file, small, host="auto"):
    dense = save_dense(config, tmp_path / "dense")
    factorize(
        str(tmp_path / "dense"),
        tmp_path / "out",
        recipe,
        text=str(text_file),
        settings=small.model_copy(update={"host": host, "baseline": False}),
    )
    return dense, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared", [0, 2])
def test_all_experts_on_equals_dense(name, shared, tmp_path, text_file, small):
    recipe = Recipe(shared=shared, active=8 - shared, parts=8, restore="none")
    dense, student = build(CONFIGS[name], recipe, tmp_path, text_file, small)
    assert student.config.model_type == ("granitemoeshared" if shared else "mixtral")
    tokens = some_tokens(CONFIGS[name])
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("config", "host"),
    [(ATTENTION_BIAS, "granitemoeshared"), (WIDE_HEADS, "mixtral"), (SLIDING_WINDOW, "mixtral")],
    ids=["attention-bias", "wide-heads", "sliding-window"],
)
def test_what_one_host_cannot_hold_another_does(config, host, tmp_path, text_file, small):
    shared = 2 if host == "granitemoeshared" else 0
    recipe = Recipe(shared=shared, active=8 - shared, parts=8, restore="none")
    dense, student = build(config, recipe, tmp_path, text_file, small)
    assert student.config.model_type == host
    tokens = some_tokens(config)
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


def test_the_experts_of_a_sparse_student_sum_to_the_dense_ffn(tmp_path, text_file, small):
    """The checkpoint of S2A2E8 itself, its top-k raised to all: nothing was lost and nothing is there twice."""
    recipe = Recipe(shared=2, active=2, parts=8, restore="none")
    dense, student = build(CONFIGS["gqa-tied"], recipe, tmp_path, text_file, small)
    for layer in student.model.layers:
        router = layer.block_sparse_moe.router
        router.top_k = 6
        router.weight.data.zero_()
        layer.block_sparse_moe.experts.down_proj.data *= 6 / 2  # stored times k = 2, gates are now 1/6
    tokens = some_tokens(student.config)
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_backend_gives_the_same_logits(backend, tmp_path, text_file, small):
    _, student = build(CONFIGS["gqa-tied"], Recipe(shared=2, active=2, parts=8), tmp_path, text_file, small)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation=backend)
    tokens = some_tokens(student.config)
    with torch.no_grad():
        assert relative_error(other(tokens).logits, student(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("config", "recipe", "host", "says"),
    [
        (CONFIGS["mha"], "S2A2E8", "mixtral", "it has no shared expert; --host auto"),
        (CONFIGS["mha"], "S0A2E4", "granitemoeshared", "always has a shared expert"),
        (CONFIGS["mha"], "S2A2E8", "dense", "it has no experts"),
        (CONFIGS["mha"], "S2A2E8", "nonsense", "no host 'nonsense'; hosts: auto"),
        (ATTENTION_BIAS, "S0A2E4", "auto", "its attention has no biases"),
        (WIDE_HEADS, "S2A2E8", "auto", "head_dim = hidden_size / heads"),
        (SLIDING_WINDOW, "S2A2E8", "auto", "no sliding window"),
        (CONFIGS["mha"], "S4A2E16", "auto", "experts of 4 neurons, but transformers' grouped_mm needs multiples of 8"),
    ],
)
def test_what_cannot_be_exact_is_refused(config, recipe, host, says):
    with pytest.raises(FactorLLMError, match=says):
        choose_host(host, config, parse_recipe(recipe).shape(config.intermediate_size))
