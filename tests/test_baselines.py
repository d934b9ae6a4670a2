"""Baselines that change a dense model: what they keep, and that what they leave is an ordinary dense model."""

import copy

import pytest
import torch
from conftest import BASE, CONFIGS, save_dense, some_tokens
from families import TINY
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError
from factorllm.baselines import block_influence, depth_prune, flap_prune, layers_to_drop
from factorllm.baselines.depth import shortened_cost
from factorllm.measure.cost import cost_of
from factorllm.recipe import Recipe


@pytest.fixture
def model(tmp_path):
    return save_dense(CONFIGS["gqa-tied"], tmp_path / "dense")


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_flap_that_keeps_every_neuron_changes_nothing(family, tmp_path):
    model = save_dense(TINY[family], tmp_path / "dense")
    tokens = some_tokens(model.config)
    before = logits(model, tokens)
    flap_prune(model, tokens, BASE["intermediate_size"])
    torch.testing.assert_close(logits(model, tokens), before)


def test_flap_keeps_what_dropped_neurons_give_on_average(model):
    """In the first layer the inputs do not change, so the mean of the FFN's output must not either."""
    tokens = some_tokens(model.config)
    means = []
    for width in (None, BASE["intermediate_size"] // 2):
        if width:
            flap_prune(model, tokens, width)
        outputs = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out, seen=outputs: seen.append(out))
        logits(model, tokens)
        hook.remove()
        means.append(outputs[0].flatten(0, 1).mean(0))
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-5)
    assert model.model.layers[0].mlp.down_proj.weight.shape[1] == BASE["intermediate_size"] // 2


def test_flap_drops_a_constant_neuron_first(model):
    """Its fluctuation is zero, however large it is."""
    ffn = model.model.layers[0].mlp
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.zero_()  # all inputs are zero, so all activations are
        model.model.layers[0].post_attention_layernorm.weight[0] = 1.0
        ffn.gate_proj.weight[5].zero_()  # silu(0) = 0: this neuron never fires
    before = ffn.gate_proj.weight.detach().clone()
    flap_prune(model, some_tokens(model.config), BASE["intermediate_size"] - 1)
    torch.testing.assert_close(ffn.gate_proj.weight, torch.cat([before[:5], before[6:]]))


def test_depth_prune_drops_the_layer_that_does_nothing(model):
    tokens = some_tokens(model.config)
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    before = logits(model, tokens)
    influence = block_influence(model, tokens)
    assert influence.argmin() == 1
    assert influence[1].abs() < 1e-6
    depth_prune(model, influence, 1)
    assert model.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(model, tokens), before)
    with torch.inference_mode():  # the cache, too, is one of two layers
        output = model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(output[:, 4:5], before[:, 3].argmax(-1, keepdim=True))


@pytest.mark.parametrize("active", [6, 4, 2])
def test_depth_prune_matches_active_parameters_as_well_as_layers_allow(active):
    config = copy.deepcopy(CONFIGS["gqa-tied"])
    config.num_hidden_layers = 30
    wanted = cost_of(config, Recipe(shared=active, active=0, parts=8).shape(64)).active_parameters
    count = layers_to_drop(config, wanted)
    got = shortened_cost(config, count).active_parameters
    one_layer = got - shortened_cost(config, count + 1).active_parameters
    assert abs(got - wanted) <= one_layer / 2


@pytest.mark.parametrize("prune", ["flap", "depth"])
def test_what_is_left_is_an_ordinary_dense_model(model, prune, tmp_path):
    tokens = some_tokens(model.config)
    if prune == "flap":
        flap_prune(model, tokens, 32)
    else:
        depth_prune(model, block_influence(model, tokens), 1)
    model.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_flap_refuses_a_family_without_ffn_biases(tmp_path):
    qwen = save_dense(CONFIGS["qwen3"], tmp_path / "qwen")
    with pytest.raises(FactorLLMError, match="qwen3 has no place for"):
        flap_prune(qwen, some_tokens(qwen.config), 32)
