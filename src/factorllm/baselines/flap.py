"""FLAP-style width prune: neurons that fluctuate least go, and their mean becomes a bias (FLAP, arXiv 2312.11983)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError


@torch.no_grad()
def flap_prune(model: PreTrainedModel, tokens: Tensor, width: int) -> None:
    """Keep `width` neurons of each FFN of `model`, in place.

    A neuron counts by its fluctuation, `Var(h_j) ||down[:, j]||^2`, for its mean is not lost: what the dropped neurons
    give on average is added as the bias of `down` (FLAP's baseline bias compensation). FLAP prunes attention heads too
    and lets layers differ in width; here only FFNs are cut, all alike, so that active parameters can be compared.

    Args:
        tokens: calibration tokens, (sequences, length), int64.
        width: neurons to keep in each FFN.

    Raises:
        FactorLLMError: when the family has no place for the bias.
    """
    if not hasattr(model.config, "mlp_bias"):
        raise FactorLLMError(f"FLAP leaves a bias in each FFN, which {model.config.model_type} has no place for")
    ffns = [layer.mlp for layer in model.model.layers]
    for ffn, (mean, variance) in zip(ffns, _moments(model, ffns, tokens), strict=True):
        fluctuation = variance * ffn.down_proj.weight.float().square().sum(0)
        kept = fluctuation.topk(width).indices.sort().values
        mean = mean.index_fill(0, kept, 0)
        bias = (ffn.down_proj.weight.float() @ mean).to(ffn.down_proj.weight.dtype)
        none = bias.new_zeros(width)
        ffn.gate_proj = _linear(ffn.gate_proj.weight[kept], none)
        ffn.up_proj = _linear(ffn.up_proj.weight[kept], none.clone())
        ffn.down_proj = _linear(ffn.down_proj.weight[:, kept], bias)
        ffn.intermediate_size = width
    model.config.intermediate_size = width
    model.config.mlp_bias = True  # Llama's config then has a bias on all three


def _moments(model: PreTrainedModel, ffns: list[nn.Module], tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each FFN's intermediate activations over all tokens: (f,) each, fp32."""
    sums = [torch.zeros(2, ffn.down_proj.in_features, dtype=torch.float64, device=model.device) for ffn in ffns]

    def watch(total: Tensor):
        def add(_module: nn.Module, given: tuple[Tensor]) -> None:
            hidden = given[0].flatten(0, 1).double()
            total.add_(torch.stack([hidden.sum(0), hidden.square().sum(0)]))

        return add

    hooks = [ffn.down_proj.register_forward_pre_hook(watch(total)) for ffn, total in zip(ffns, sums, strict=True)]
    try:
        for rows in tokens.split(1):
            model.model(rows.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = [(total / tokens.numel()).unbind() for total in sums]
    return [(mean.float(), (square - mean.square()).float()) for mean, square in means]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
    return linear
