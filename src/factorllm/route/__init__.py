"""Which experts a token runs: the dense FFN's prior, the PA loss, and the routers fitted by it."""

from factorllm.route.prior import expert_scores, prior_distribution
from factorllm.route.router import ROUTERS, fit_router, gate_weights, pa_loss

__all__ = ["ROUTERS", "expert_scores", "fit_router", "gate_weights", "pa_loss", "prior_distribution"]
