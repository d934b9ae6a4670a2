"""A random split: FactorLLM (arXiv 2408.11855, section 3.1) and LLaMA-MoE (arXiv 2406.16554)."""

import torch
from torch import Tensor

from factorllm.convert.partition.balanced import random_labels
from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape


def at_random(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    return random_labels([shape.expert_width] * shape.experts + [shape.shared_width], generator)
