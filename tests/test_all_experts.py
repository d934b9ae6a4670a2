"""The gradient of routers by way of all experts: that of its formula, beside a forward pass that stays as it was."""

import copy

import pytest
import torch
from conftest import relative_error, some_tokens
from test_families import SPECIAL, TINY
from transformers import AutoModelForCausalLM

from factorllm.convert.route.router import FLATTEN
from factorllm.healing.all_experts import learn_from_all_experts
from factorllm.hosts import HOSTS, MoeHost
from factorllm.recipe import Recipe
from factorllm.student.routers import Routers, is_router, router_weight

ONE_OF_MANY = Recipe(shared=0, active=1, parts=8)
WITH_A_SHARED_PART = Recipe(shared=1, active=1, parts=8)
TWO_OF_MANY = Recipe(shared=1, active=2, parts=8)

MOE_HOSTS = [host.name for host in HOSTS.values() if isinstance(host, MoeHost)]


def random_student(host: str, recipe: Recipe | None = None):
    """A student with random weights, its routers flattened as a student's are."""
    family = HOSTS[host].families[0]
    recipe = recipe or (ONE_OF_MANY if HOSTS[host].shared == "no" else WITH_A_SHARED_PART)
    config = HOSTS[host].config(SPECIAL.get((family, host), TINY[family]), recipe.shape(64))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_router(name):
                parameter.normal_().mul_(FLATTEN)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("host", MOE_HOSTS)
def test_what_is_computed_stays_and_each_router_learns(host):
    plain = random_student(host)
    learning = copy.deepcopy(plain)
    Routers(plain)
    routers = Routers(learning)
    assert routers.modules
    learn_from_all_experts(learning, routers)
    tokens = some_tokens(plain.config, length=16)
    outputs = [model(tokens, labels=tokens) for model in (plain, learning)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert min(router_weight(module).grad.abs().max() for module in routers.modules) > 1e-6
    for (name, one), other in zip(plain.named_parameters(), learning.parameters(), strict=True):
        if ".experts." in name:
            assert relative_error(other.grad, one.grad) < 1e-2, name
    with torch.no_grad():
        assert torch.equal(learning(tokens).logits, outputs[0].logits)


@pytest.mark.parametrize(
    ("host", "recipe"), [("mixtral", ONE_OF_MANY), ("granitemoeshared", TWO_OF_MANY), ("qwen2_moe", TWO_OF_MANY)]
)
def test_the_gradient_is_that_of_the_formula(host, recipe):
    """`y = sum_i [z_i + p_i - sg(p_i)] E_i(x)`, in one layer, left to autograd."""
    model = random_student(host, recipe)
    routers = Routers(model)
    router = routers.modules[0]
    block = next(module for module in model.modules() if router in module.children())
    x, above = torch.randn(2, 1, 24, 32)
    experts = copy.deepcopy(block.experts)
    learn_from_all_experts(model, routers)
    weight = router_weight(router)
    (found,) = torch.autograd.grad(block.experts(x[0], *reversed(router(x[0])[1:])), weight, above[0])

    unflattened = (weight.detach() / FLATTEN).requires_grad_()
    chances = (x[0] @ unflattened.T).softmax(-1)
    picks = torch.zeros_like(chances).scatter(1, chances.topk(recipe.active).indices, 1.0)
    gate = router(x[0])[1].mean().expand(24, 1)
    columns = (torch.full((24, 1), expert) for expert in range(chances.shape[1]))
    each = [experts(x[0], column, gate).detach() for column in columns]
    mixed = sum(z[:, None] * expert for z, expert in zip((picks + chances - chances.detach()).T, each, strict=True))
    (expected,) = torch.autograd.grad(mixed, unflattened, above[0])
    assert relative_error(found, expected) < 1e-2


def test_where_one_expert_is_weighted_by_one_the_teacher_says_nothing_otherwise():
    model = random_student("mixtral")
    Routers(model)
    tokens = some_tokens(model.config, length=16)
    model(tokens, labels=tokens).loss.backward()
    assert max(p.grad.abs().max() for name, p in model.named_parameters() if is_router(name)) < 1e-7


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for recomputed in (False, True):
        model = random_student("mixtral")
        routers = Routers(model)
        learn_from_all_experts(model, routers)
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = some_tokens(model.config, length=16)
        model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([router_weight(module).grad for module in routers.modules])
    for one, other in zip(*gradients, strict=True):
        assert relative_error(other, one) < 1e-5
