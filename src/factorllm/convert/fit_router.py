"""Third step of a layer: a router that picks the experts which the dense FFN's own activations call for."""

from __future__ import annotations

import torch
from torch import Tensor

from factorllm.convert.partition import Partition
from factorllm.convert.partition.energy import expert_picks
from factorllm.convert.ridge import GatedHidden, RidgeStatistics, solve_ridge_at
from factorllm.convert.route import (
    FLATTEN,
    can_refine,
    expert_scores,
    expert_sets,
    fit_router,
    prior_distribution,
    refine_router,
    scale_to_prior,
    set_errors,
)
from factorllm.convert.task import LayerTask
from factorllm.dense.ffn import FFN

_REFINING_STRENGTH = 0.1  # of the ridge that restores the student on whose errors a router is refined
_CHECKED_SHARE = 8  # one in so many of the router's tokens is kept to measure its agreement with the prior


def fit_layer_router(task: LayerTask, split: Partition, kept: FFN) -> tuple[Tensor, float]:
    """The router (N, d), and its agreement with the prior: the share of its picks that the prior makes too, on tokens
    that it was not fitted on.

    Args:
        kept: the dense FFN's neurons in the student's order.
    """
    recipe, shape, ffn = task.recipe, task.shape, task.layer.ffn
    inputs, scores = _inputs_and_scores(task, split)
    fitted = len(inputs) - len(inputs) // _CHECKED_SHARE
    prior = prior_distribution(scores[:fitted], shape.top_k, recipe.prior)
    router = fit_router(recipe.router, inputs[:fitted], prior, ffn, split, shape.top_k, task.generator)
    if recipe.router == "refined" and can_refine(shape.experts, shape.top_k):
        router = _refine(task, router, inputs[:fitted], split, kept)
        router *= scale_to_prior(inputs[:fitted] @ router.T, prior)
    router = task.ranks.same(router)
    picked = expert_picks(inputs[fitted:] @ router.T, shape.top_k)
    wanted = expert_picks(scores[fitted:], shape.top_k)
    return router * FLATTEN, ((picked * wanted).sum() / wanted.sum()).item()


def _inputs_and_scores(task: LayerTask, split: Partition) -> tuple[Tensor, Tensor]:
    """FFN inputs (n, d) and the prior's scores of the experts (n, N), of the sampled tokens of all processes."""
    inputs, scores = [], []
    for run in task.sample.runs():
        hidden = task.stored_tokens(task.sample, run)
        scores.append(expert_scores(task.layer.ffn, hidden, split, task.shape.top_k, task.recipe.prior))
        inputs.append(task.tokens(task.inputs, run, sampled=True))
    return task.ranks.gather(torch.cat(inputs)), task.ranks.gather(torch.cat(scores))


def _refine(task: LayerTask, router: Tensor, inputs: Tensor, split: Partition, kept: FFN) -> Tensor:
    """The router, refined on the errors of the student that is restored with the router's first picks.

    Args:
        inputs: FFN inputs of the first of the sampled tokens, which it is fitted on.
    """
    shape = task.shape
    down = kept.down.float()
    if task.recipe.restore != "none":
        first = RidgeStatistics(shape, task.middle.width, task.device)
        for x, hidden, target, weights in task.sampled_batches(split):
            active = GatedHidden(hidden, task.gates(x, router * FLATTEN), shape)
            first.update(active, target, weights)
        first.share(task.ranks)
        down = solve_ridge_at(first, down, _REFINING_STRENGTH, torch.float32)
    sets = expert_sets(shape.experts, shape.top_k).to(task.device)
    errors = []
    for _, hidden, target, weights in task.sampled_batches(split):
        shared, *experts = (
            hidden[:, columns] @ down[:, columns].T for columns in (shape.shared_columns, *shape.expert_columns())
        )
        errors.append(set_errors(torch.stack(experts, 1), target - shared, sets) * weights[:, None])
    errors = task.ranks.gather(torch.cat(errors))
    return refine_router(router, inputs, errors[: len(inputs)], sets)
