import pytest
import torch

from factorllm.convert.ridge import LAMBDAS, WEAKER, GatedHidden, RidgeStatistics, solve_ridge
from factorllm.dense.ffn import FFN
from factorllm.hosts.gates import SOFTMAX_OF_SELECTED
from factorllm.recipe import Shape

SHAPE = Shape(20, 8, 4, 3, 2)
ONE_EXPERT, NONE_SHARED = Shape(20, 8, 4, 3, 1), Shape(20, 0, 4, 5, 1)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, ONE_EXPERT, NONE_SHARED], ids=["two", "one", "one, none shared"])


def batch(tokens: int, seed: int, shape: Shape = SHAPE) -> GatedHidden:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 20, generator=generator)
    logits = torch.randn(tokens, shape.experts, generator=generator)
    return GatedHidden(hidden, SOFTMAX_OF_SELECTED.weights(logits, shape.top_k), shape)


def statistics(batches, targets) -> RidgeStatistics:
    result = RidgeStatistics(batches[0].shape, targets[0].shape[1], torch.device("cpu"))
    for active, target in zip(batches, targets, strict=True):
        result.update(active, target, torch.ones(len(target)))
    return result


@SHAPES
def test_sparse_products_equal_the_dense_matrix(shape):
    active, target = batch(50, 0, shape), torch.randn(50, 5)
    M, down = active.dense(), torch.randn(5, 20)
    assert ((M != 0).sum(1) == shape.active_width).all()
    torch.testing.assert_close(active.project(down), M @ down.T)
    sums = statistics([active], [target])
    torch.testing.assert_close(sums.gram @ torch.eye(20), M.T @ M, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.cross, M.T @ target, rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_weighted_least_squares():
    active, target, weights = batch(50, 0), torch.randn(50, 5), torch.rand(50) + 0.5
    sums = RidgeStatistics(SHAPE, 5, torch.device("cpu"))
    sums.update(active, target, weights)
    weighted = active.dense() * weights[:, None]
    torch.testing.assert_close(sums.gram @ torch.eye(20), active.dense().T @ weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.cross, weighted.T @ target, rtol=1e-4, atol=1e-4)


def test_batches_accumulate():
    parts, targets = [batch(30, 1), batch(40, 2)], [torch.randn(30, 5), torch.randn(40, 5)]
    M, T = torch.cat([p.dense() for p in parts]), torch.cat(targets)
    sums = statistics(parts, targets)
    torch.testing.assert_close(sums.gram @ torch.eye(20), M.T @ M, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.cross, M.T @ T, rtol=1e-4, atol=1e-4)


@SHAPES
def test_the_solution_is_the_ridge_regression_and_finds_the_truth(shape):
    truth, down = torch.randn(5, 20), torch.randn(5, 20)
    parts = [batch(400, seed, shape) for seed in range(4)]
    folds = [statistics([p], [p.project(truth)]) for p in parts]
    restored, strength = solve_ridge(folds, down)
    assert strength == WEAKER * min(LAMBDAS)  # nothing is noise here, so the weakest ridge predicts best
    M, T = torch.cat([p.dense() for p in parts]), torch.cat([p.project(truth) for p in parts])
    gram = M.T @ M
    damped = gram + strength * gram.diagonal().mean() * torch.eye(20)
    by_hand = down + torch.linalg.solve(damped, M.T @ (T - M @ down.T)).T
    torch.testing.assert_close(restored, by_hand, rtol=1e-3, atol=1e-3)
    assert (restored - truth).norm() < 0.05 * (down - truth).norm()


def test_the_strength_does_not_hang_on_where_the_search_begins():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200, 20, generator=generator)  # more channels of the output than are looked at
    parts = [batch(60, seed) for seed in range(3)]
    targets = [part.project(truth) for part in parts]
    noisy = [target + 6 * torch.randn(target.shape, generator=generator) for target in targets]

    def strength(expected):
        folds = [statistics([part], [target]) for part, target in zip(parts, noisy, strict=True)]
        return solve_ridge(folds, torch.zeros(200, 20), expected)[1]

    found = [strength(expected) for expected in (None, 3e-4, 1.0)]
    assert len(set(found)) == 1
    assert min(LAMBDAS) < found[0] / WEAKER < max(LAMBDAS)


def test_pure_noise_changes_little_or_nothing():
    down = torch.zeros(5, 20)
    folds = [statistics([batch(15, seed)], [torch.randn(15, 5)]) for seed in range(4)]
    restored, strength = solve_ridge(folds, down)
    assert strength is None or strength >= WEAKER
    assert restored.norm() < 4


def test_only_the_active_neurons_run():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 6, generator=generator), torch.randn(20, 6, generator=generator)]
    ffn, inputs = FFN(*weights, torch.randn(5, 20)), torch.randn(30, 6, generator=generator)
    gates = SOFTMAX_OF_SELECTED.weights(torch.randn(30, 4, generator=generator), 2)
    active = GatedHidden.compute(ffn, inputs, gates, SHAPE)
    whole = GatedHidden(ffn.hidden(inputs), gates, SHAPE)
    torch.testing.assert_close(active.dense(), whole.dense())
    assert ((active.hidden == 0).sum(1) == 6).all()
