"""What a conversion cost and what it gained: perplexity, and the arithmetic of parameters and FLOPs."""

from factorllm.measure.cost import Cost, cost_of
from factorllm.measure.generate import complete
from factorllm.measure.perplexity import perplexity, refuse_infinite

__all__ = ["Cost", "complete", "cost_of", "perplexity", "refuse_infinite"]
