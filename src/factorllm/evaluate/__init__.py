"""What a conversion cost and what it gained: perplexity, and the arithmetic of parameters and FLOPs."""

from factorllm.evaluate.cost import Cost, cost_of
from factorllm.evaluate.generate import complete
from factorllm.evaluate.perplexity import perplexity, refuse_infinite

__all__ = ["Cost", "complete", "cost_of", "perplexity", "refuse_infinite"]
