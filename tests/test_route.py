import pytest
import torch

from factorllm.convert.partition import partition
from factorllm.convert.partition.energy import expert_picks
from factorllm.convert.route import (
    FLATTEN,
    can_refine,
    expert_scores,
    expert_sets,
    fit_router,
    pa_loss,
    prior_distribution,
    refine_router,
    set_errors,
)
from factorllm.dense.ffn import FFN
from factorllm.hosts.gates import SIGMOID, SOFTMAX_OF_ALL, SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape

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
    router = fit_router("pa", x, target, ffn, split, 2, torch.Generator())
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


@pytest.mark.parametrize("gates", [SOFTMAX_OF_SELECTED, SOFTMAX_OF_ALL, SIGMOID])
def test_flattened_gates_are_nearly_binary_and_keep_the_order(gates, case):
    x, ffn, split = case
    target = prior_distribution(expert_scores(ffn, ffn.hidden(x), split, 2, "energy"), 2, "energy")
    router = fit_router("pa", x, target, ffn, split, 2, torch.Generator())
    flat = gates.weights(x @ router.T * FLATTEN, 2)
    assert (flat[flat > 0] - 1).abs().max() < 0.02
    assert torch.equal(flat > 0, gates.weights(x @ router.T, 2) > 0)


def errors_of_sets(case, sets):
    """Errors when the routed part is dropped but for a set of experts, and the experts' outputs."""
    x, ffn, split = case
    outputs = torch.stack([ffn.hidden(x)[:, i] @ ffn.down[:, i].T for i in split.experts], dim=1)
    return set_errors(outputs, outputs.sum(1), sets), outputs


def test_set_errors_are_the_squared_errors_above_the_best_set(case):
    sets = expert_sets(6, 2)
    assert sets.shape == (15, 6)
    assert (sets.sum(1) == 2).all()
    errors, outputs = errors_of_sets(case, sets)
    by_hand = torch.stack([(outputs.sum(1) - outputs[:, s.bool()].sum(1)).square().sum(1) for s in sets], dim=1)
    torch.testing.assert_close(errors, by_hand - by_hand.min(1, keepdim=True).values, rtol=1e-3, atol=0.05)


def test_a_refined_router_picks_sets_of_smaller_error(case):
    x, ffn, split = case
    sets = expert_sets(6, 2)
    errors, _ = errors_of_sets(case, sets)
    target = prior_distribution(expert_scores(ffn, ffn.hidden(x), split, 2, "energy"), 2, "energy")
    start = fit_router("refined", x, target, ffn, split, 2, torch.Generator())
    refined = refine_router(start, x, errors, sets)

    def picked_error(router):
        return (errors * (expert_picks(x @ router.T, 2) @ sets.T == 2)).sum(1).mean()

    assert picked_error(refined) < 0.97 * picked_error(start)


def test_a_router_with_too_many_sets_to_compare_is_not_refined():
    assert can_refine(6, 2)
    assert not can_refine(6, 6)
    assert not can_refine(64, 8)
