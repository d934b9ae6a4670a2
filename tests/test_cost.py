"""FLOPs and parameters by formula equal those that are counted."""

import pytest
import torch
from conftest import CONFIGS, save_dense, some_tokens
from families import TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from factorllm import factorize, parse_recipe
from factorllm.measure.cost import cost_of, dense_shape

ATTENTION_PRODUCTS = ("scaled_dot_product", "bmm", "_sdp")


def counted_flops(model, tokens: torch.Tensor) -> int:
    """FLOPs of the matrix products with weights, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens, use_cache=False)
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for op, n in by_operation.items() if not any(word in str(op) for word in ATTENTION_PRODUCTS))


@pytest.mark.parametrize("name", ["gqa-tied", "gqa-untied", "odd-sizes", "arcee"])
def test_dense_cost(name, tmp_path):
    model = save_dense((CONFIGS | TINY)[name], tmp_path)
    tokens = some_tokens(model.config)
    cost = cost_of(model.config, dense_shape(model.config))
    assert cost.total_parameters == model.num_parameters()
    assert cost.flops_per_token * tokens.numel() == counted_flops(model, tokens)


@pytest.mark.parametrize(
    ("recipe", "sparsity"), [("S2A2E8", 0.5), ("1R4E1K", 0.75), ("S4A0E8", 0.5), ("S0A2E4N3", 0.5), ("S1A1E4N4", 0.5)]
)
def test_student_cost(recipe, sparsity, tmp_path, dense_folder, text_file, small):
    factorize(str(dense_folder), tmp_path / "out", recipe, text=str(text_file), settings=small)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    config = CONFIGS["gqa-tied"]
    cost = cost_of(config, parse_recipe(recipe).shape(config.intermediate_size))
    tokens = some_tokens(config)
    assert cost.ffn_sparsity == sparsity
    assert cost.total_parameters == student.num_parameters()
    assert cost.flops_per_token * tokens.numel() == counted_flops(student, tokens)


@pytest.mark.parametrize("host", ["granitemoeshared", "glm4_moe"])
def test_the_table_counts_what_is_written(host, tmp_path, dense_folder, text_file, small):
    """Some hosts hold a tied output head apart from the embeddings."""
    settings = small.model_copy(update={"host": host, "baseline": True})
    summary = factorize(str(dense_folder), tmp_path / "out", "S2A2E8", text=str(text_file), settings=settings)
    dense, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense_folder, tmp_path / "out"))
    assert summary.row("dense").cost.total_parameters == dense.num_parameters()
    assert summary.row("student").cost.total_parameters == student.num_parameters()
    assert summary.row("pruned").cost.total_parameters < dense.num_parameters()
    assert dense.config.tie_word_embeddings
