import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from factorllm.ffn import FFN
from factorllm.partition import partition
from factorllm.partition.energy import expert_picks
from factorllm.recipe import Shape
from factorllm.route import expert_scores, fit_router, gate_weights, pa_loss, prior_distribution

SHAPE = Shape(48, 12, 6, 6, 2)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=generator)
    ffn = FFN(*(torch.randn(48, 16, generator=generator) for _ in range(2)), torch.randn(16, 48, generator=generator))
    split = partition(ffn, ffn.hidden(x), SHAPE, "energy")
    return x, ffn, split


@pytest.mark.parametrize("prior", ["energy", "paper"])
def test_router_gradient_is_not_zero_and_the_pa_loss_falls(case, prior):
    x, ffn, split = case
    scores = expert_scores(ffn, ffn.hidden(x), split, 2, prior)
    target = prior_distribution(scores, 2, prior)
    start = torch.zeros(6, 16, requires_grad=True)
    before = pa_loss(x @ start.T, target)
    before.backward()
    assert start.grad.norm() > 1e-3
    router = fit_router("pa", x, target, ffn, split, 2, torch.Generator()) * 2.0**10
    assert pa_loss(x @ router.T, target) < before.item() - 1e-3


def test_fitted_router_agrees_more_than_analytic_and_random(case):
    x, ffn, split = case
    scores = expert_scores(ffn, ffn.hidden(x), split, 2, "energy")
    target, wanted = prior_distribution(scores, 2, "energy"), expert_picks(scores, 2)
    agreement = {}
    for kind in ("pa", "analytic", "random"):
        router = fit_router(kind, x, target, ffn, split, 2, torch.Generator().manual_seed(1))
        agreement[kind] = ((expert_picks(x @ router.T, 2) * wanted).sum() / wanted.sum()).item()
    assert agreement["pa"] > agreement["random"] + 0.1
    assert agreement["pa"] > agreement["analytic"]


def test_energy_prior_is_what_is_lost_with_the_expert(case):
    x, ffn, split = case
    scores = expert_scores(ffn, ffn.hidden(x), split, 2, "energy")
    neurons = split.experts[3]
    by_hand = (ffn.hidden(x)[:, neurons] ** 2 * (ffn.down[:, neurons] ** 2).sum(0)).sum(1)
    torch.testing.assert_close(scores[:, 3], by_hand)


def test_paper_prior_is_the_distance_to_the_fair_share(case):
    x, ffn, split = case
    outputs = torch.stack([ffn.hidden(x)[:, i] @ ffn.down[:, i].T for i in split.experts], dim=1)
    whole = outputs.sum(1)
    by_hand = -((outputs[:, 1] - whole / (6 / 2)) ** 2).mean(-1)
    torch.testing.assert_close(expert_scores(ffn, ffn.hidden(x), split, 2, "paper")[:, 1], by_hand)
    label = prior_distribution(expert_scores(ffn, ffn.hidden(x), split, 2, "paper"), 2, "paper")
    assert label.max() / label.min() == pytest.approx(torch.e, rel=1e-5)


def test_gate_weights_are_those_of_mixtral(case):
    x, _, _ = case
    router = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=2))
    router.weight.data = torch.randn(6, 16)
    logits, weights, indices = router(x)
    ours = gate_weights(logits, 2)
    torch.testing.assert_close(ours.gather(1, indices), 2 * weights)
    assert ((ours > 0).sum(1) == 2).all()


def test_flattened_gates_are_nearly_binary_and_keep_the_order(case):
    x, ffn, split = case
    target = prior_distribution(expert_scores(ffn, ffn.hidden(x), split, 2, "energy"), 2, "energy")
    router = fit_router("pa", x, target, ffn, split, 2, torch.Generator())
    gates = gate_weights(x @ router.T, 2)
    assert (gates[gates > 0] - 1).abs().max() < 0.02
    assert torch.equal(gates > 0, gate_weights(x @ (router * 2.0**10).T, 2) > 0)
