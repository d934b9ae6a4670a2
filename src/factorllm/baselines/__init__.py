"""What a user would pick instead of a factorised model, at the same active parameters.

The static width prune by energy is a recipe (`Recipe.static_prune`), for it goes through the same restore. The others
here change a loaded dense model in place and leave an ordinary dense model.
"""

from factorllm.baselines.depth import block_influence, depth_prune, layers_to_drop
from factorllm.baselines.flap import flap_prune

__all__ = ["block_influence", "depth_prune", "flap_prune", "layers_to_drop"]
