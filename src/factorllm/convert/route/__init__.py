"""Which experts a token runs: the dense FFN's prior, the PA loss, and the routers fitted by it."""

from factorllm.convert.route.prior import expert_scores, prior_distribution
from factorllm.convert.route.refine import can_refine, expert_sets, refine_router, scale_to_prior, set_errors
from factorllm.convert.route.router import FLATTEN, fit_router, pa_loss

__all__ = [
    "FLATTEN",
    "can_refine",
    "expert_scores",
    "expert_sets",
    "fit_router",
    "pa_loss",
    "prior_distribution",
    "refine_router",
    "scale_to_prior",
    "set_errors",
]
