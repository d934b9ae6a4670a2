"""Whether a tensor holds numbers only."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. Its extremes say it, far faster than `torch.isfinite` on a CPU."""
    return not tensor.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))
