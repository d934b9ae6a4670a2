"""The gradient fit of a layer's kept neurons to its dense FFN."""

import pytest
import torch
from conftest import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM

from factorllm import factorize
from factorllm.convert.ridge import GatedHidden
from factorllm.convert.tune import tune
from factorllm.dense.ffn import FFN
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape

D, SHAPE = 16, Shape(64, 16, 6, 8, 2)


def batch(seed: int, dense: FFN, router: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(seed))
    gates = SOFTMAX_OF_SELECTED.weights(x @ router.T * 2**-10, SHAPE.top_k)
    return x, gates, dense.hidden(x) @ dense.down.T, torch.ones(256)


def squared_error(ffn: FFN, x: Tensor, gates: Tensor, target: Tensor) -> float:
    output = GatedHidden.compute(ffn, x, gates, SHAPE).project(ffn.down)
    return relative_error(output, target) ** 2


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_the_student_comes_nearer_to_the_dense_ffn_on_new_tokens(activation):
    """With a gate, and without as those of relu squared are."""
    torch.manual_seed(0)
    gate = torch.randn(64, D) / 4 if activation == "silu" else None
    dense = FFN(gate, torch.randn(64, D) / 4, torch.randn(D, 64) / 8, activation)
    router = torch.randn(6, D)
    with torch.no_grad():
        tuned = tune(dense, SHAPE, (batch(seed, dense, router) for seed in range(200)), 200)
        x, gates, target, _ = batch(1000, dense, router)
        assert squared_error(tuned, x, gates, target) < 0.8 * squared_error(dense, x, gates, target)
    assert dense.up.requires_grad is tuned.up.requires_grad is False
    assert not torch.equal(dense.up, tuned.up)
    assert (tuned.gate is None) == (gate is None)


def test_tokens_of_no_weight_teach_nothing():
    torch.manual_seed(0)
    dense = FFN(torch.randn(64, D) / 4, torch.randn(64, D) / 4, torch.randn(D, 64) / 8)
    x, gates, target, _ = batch(0, dense, torch.randn(6, D))
    tuned = tune(dense, SHAPE, [(x, gates, target, torch.zeros(256))], 1)
    assert torch.equal(tuned.gate, dense.gate)


@pytest.mark.parametrize("share", [1, 2])
def test_a_tuned_model_is_nearer_to_the_dense_one(share, dense_folder, text_file, small, tmp_path, monkeypatch):
    """Also when its start in closed form is fitted on a share of the tokens only, as that of a long run is."""
    monkeypatch.setattr("factorllm.convert.tune._START_TOKENS", small.tokens // share)
    made = {
        passes: factorize(
            str(dense_folder),
            tmp_path / str(passes),
            "S1A1E4",
            text=str(text_file),
            settings=small.model_copy(update={"tune": passes}),
        )
        for passes in (0, 3)
    }
    assert made[3].layers[0]["stream_error"] < made[0].layers[0]["stream_error"]
    gates = [
        AutoModelForCausalLM.from_pretrained(summary.out).model.layers[0].shared_mlp.input_linear.weight
        for summary in made.values()
    ]
    assert not torch.equal(*gates)
