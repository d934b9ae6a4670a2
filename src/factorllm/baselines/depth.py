"""Depth prune: whole layers go, those that change the stream least (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedConfig, PreTrainedModel

from factorllm.baselines.watch import run_watched
from factorllm.dense.families import ffn_layers, keep_first_layers
from factorllm.dense.modules import decoder_layers
from factorllm.errors import FactorLLMError
from factorllm.measure.cost import Cost, cost_of, dense_shape


@torch.inference_mode()
def block_influence(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`1 - cos(stream before the layer, after it)`, mean over tokens (ShortGPT, equation 1): (layers,), fp32.

    Args:
        tokens: (sequences, length), int64.
    """
    total = torch.zeros(model.config.num_hidden_layers, device=model.device)

    def watch(index: int):
        def add(_layer: nn.Module, given: tuple[Tensor], after: Tensor) -> None:
            total[index] += (1 - cosine_similarity(given[0].float(), after.float(), dim=-1)).sum()

        return add

    # Hooks rather than `output_hidden_states`, whose last entry is already normalised.
    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(decoder_layers(model))]
    run_watched(model, tokens, hooks)
    return total / tokens.numel()


def depth_prune(model: PreTrainedModel, influence: Tensor, count: int) -> None:
    """Drop the `count` layers of least influence from `model`, in place.

    Args:
        influence: (layers,), of `block_influence`.

    Raises:
        FactorLLMError: when layers are not alike.
    """
    _refuse_unlike(model.config)
    dropped = set(influence.topk(count, largest=False).indices.tolist())
    kept = [index for index in range(len(influence)) if index not in dropped]
    layers = decoder_layers(model)
    model.get_decoder().layers = nn.ModuleList([layers[index] for index in kept])
    for place, layer in enumerate(decoder_layers(model)):
        layer.self_attn.layer_idx = place  # its place in the cache
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kinds[index] for index in kept]
    model.config.num_hidden_layers = len(kept)


def _refuse_unlike(config: PreTrainedConfig) -> None:
    if len(ffn_layers(config)) < config.num_hidden_layers:
        raise FactorLLMError(
            f"a depth prune drops layers of attention and FFN; each layer of {config.model_type} is one thing alone: "
            "compare with factorllm prune"
        )


def layers_to_drop(config: PreTrainedConfig, active_parameters: int) -> int:
    """How many layers must go so that about `active_parameters` remain; at least one layer stays.

    Raises:
        FactorLLMError: when layers are not alike.
    """
    _refuse_unlike(config)
    counts = range(config.num_hidden_layers)
    return min(counts, key=lambda count: abs(shortened_cost(config, count).active_parameters - active_parameters))


def shortened_cost(config: PreTrainedConfig, count: int) -> Cost:
    """The cost of the dense model without `count` of its layers; their share is its FFN sparsity."""
    shorter = copy.deepcopy(config)
    keep_first_layers(shorter, config.num_hidden_layers - count)
    return replace(cost_of(shorter, dense_shape(config)), ffn_sparsity=count / config.num_hidden_layers)
