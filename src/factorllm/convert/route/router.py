"""Linear routers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from factorllm.convert.partition import Partition
from factorllm.dense.ffn import FFN

FLATTEN = 2.0**-10
"""Factor on a router's weights that makes the gate weights nearly binary. A power of two only shifts exponents, so the
order of the logits, and with it the routing, is unchanged in a dtype that holds such small numbers. float16 does not
hold all of them: `stored.as_stored` refuses a router that it would change."""

_STEPS = 30
_WEIGHT_DECAY = 1e-4  # on the weights of standardised inputs


def pa_loss(logits: Tensor, prior: Tensor) -> Tensor:
    """Prior-Approximate loss `KL(prior || softmax(logits))`, mean over tokens (FactorLLM, arXiv 2408.11855, eq. 6).

    Args:
        logits: (n, N) router logits.
        prior: (n, N) distribution over experts, made from the dense FFN.
    """
    return kl_div(log_softmax(logits, dim=1), prior, reduction="batchmean")


def fit_router(
    kind: str, x: Tensor, prior: Tensor, ffn: FFN, partition: Partition, top_k: int, generator: torch.Generator
) -> Tensor:
    """Weights of a linear router: (N, d), fp32.

    Args:
        kind: `pa` minimises the PA loss, and so does `refined`, as its start; `analytic` takes the gate row of each
            expert's most typical neuron, after CMoE (arXiv 2502.04416); `random` is the baseline.
        x: (n, d) FFN inputs of calibration tokens.
        prior: (n, N) distribution over experts for the same tokens.

    With every expert active the router decides nothing, and zero weights make the gates exactly equal.
    """
    experts, width = prior.shape[1], x.shape[1]
    if top_k == experts:
        return torch.zeros(experts, width, device=x.device)
    if kind == "analytic":
        return _typical_gate_rows(ffn, partition)
    if kind == "random":
        return torch.randn(experts, width, generator=generator).to(x.device)
    # A multinomial logistic regression: convex, so it has one optimum and needs no learning rate.
    return fit_linear(x, lambda logits: pa_loss(logits, prior), torch.zeros(experts, width, device=x.device))


def fit_linear(x: Tensor, loss_of: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Minimise a loss of a router's logits over all tokens at once, by L-BFGS.

    Args:
        x: (n, d) FFN inputs.
        loss_of: logits (n, N) -> loss.
        start: (N, d) weights.

    Returns:
        Weights (N, d).
    """
    scale = x.square().mean(0).sqrt().clamp_min(1e-6)
    standard = x / scale
    weights = (start * scale).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, history_size=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(standard @ weights.T) + _WEIGHT_DECAY * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach() / scale


def _typical_gate_rows(ffn: FFN, partition: Partition) -> Tensor:
    """The gate row of the neuron nearest to the mean of each expert: (N, d).

    CMoE routes by the whole activation of that neuron; the hosts have linear routers, so its gate is what remains.
    """
    rows = ffn.triggers.float()[partition.experts.to(ffn.triggers.device)]
    distance = (rows - rows.mean(1, keepdim=True)).square().sum(-1)
    return rows[torch.arange(len(rows)), distance.argmin(1)]
