"""FLAP-style width prune: neurons that fluctuate least go, and their mean becomes a bias (FLAP, arXiv 2312.11983)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.baselines.watch import run_watched
from factorllm.dense.families import family_of
from factorllm.dense.layer import ffn_of
from factorllm.dense.modules import layers_with_ffn
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
    layers = layers_with_ffn(model)
    modules = [layer.get_submodule(family_of(model.config).ffn.slot) for layer in layers]
    for layer, module, (mean, variance) in zip(layers, modules, _moments(model, modules, tokens), strict=True):
        ffn = ffn_of(layer, model.config)
        neurons = (variance * ffn.neuron_gain()).topk(width).indices.sort().values
        kept = ffn.part(neurons)
        bias = (ffn.down.float() @ mean.index_fill(0, neurons, 0)).to(ffn.down.dtype)
        if kept.gate is not None:
            module.gate_proj = _linear(kept.gate, bias.new_zeros(width))
        module.up_proj = _linear(kept.up, bias.new_zeros(width))
        module.down_proj = _linear(kept.down, bias)
        module.intermediate_size = width
    model.config.intermediate_size = width
    model.config.mlp_bias = True  # Llama's config then has a bias on all three


def _moments(model: PreTrainedModel, modules: list[nn.Module], tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each FFN's intermediate activations over all tokens: (f,) each, fp32."""
    downs = [module.down_proj for module in modules]
    sums = [torch.zeros(2, down.in_features, dtype=torch.float64, device=model.device) for down in downs]

    def watch(total: Tensor):
        def add(_module: nn.Module, given: tuple[Tensor]) -> None:
            hidden = given[0].flatten(0, 1).double()
            total.add_(torch.stack([hidden.sum(0), hidden.square().sum(0)]))

        return add

    run_watched(model, tokens, [down.register_forward_pre_hook(watch(t)) for down, t in zip(downs, sums, strict=True)])
    means = [(total / tokens.numel()).unbind() for total in sums]
    return [(mean.float(), (square - mean.square()).float()) for mean, square in means]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
    return linear
