"""Contiguous blocks of neurons: what FactorLLM's public code does. The shared part is the first block."""

import torch
from torch import Tensor

from factorllm.dense.ffn import FFN
from factorllm.recipe import Shape


def contiguous(ffn: FFN, hidden: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    routed = torch.arange(shape.experts).repeat_interleave(shape.expert_width)
    return torch.cat([torch.full((shape.shared_width,), shape.experts), routed])
