"""Second step of a layer: which neurons are shared, and which are in which expert."""

from __future__ import annotations

import torch

from factorllm.convert.partition import Partition, keep_top_energy, partition
from factorllm.convert.task import TOO_LARGE, LayerTask
from factorllm.errors import FactorLLMError

_TOKENS = 8192


def split_neurons(task: LayerTask) -> Partition:
    """The partition, by the recipe's method, on the sampled tokens of all processes.

    Raises:
        FactorLLMError: when activations are so large that no partition can compare them.
    """
    ffn, sample, ranks = task.layer.ffn, task.sample, task.ranks
    stride = max(sample.sequences * sample.length // _TOKENS, 1)
    hidden = torch.cat([task.stored_tokens(sample, run)[::stride] for run in sample.runs()])
    hidden = ranks.gather(hidden)
    # No partition can compare energies that are infinite.
    most = hidden.abs().max().item() ** 2 * ffn.neuron_gain().max().item() * ffn.width
    if not most < torch.finfo(torch.float32).max:
        raise FactorLLMError(f"what a neuron adds to the stream overflows float32: {TOO_LARGE}")
    if task.recipe.is_prune:
        own = None
        if task.own is not None:
            own = torch.cat([kinds[::stride] for kinds in task.sampled_own()]).to(task.device)
            own = ranks.gather(own.float()).bool()
        split = keep_top_energy(ffn, hidden, task.shape, own)
    else:
        split = partition(ffn, hidden, task.shape, task.recipe.partition, task.generator)
    return Partition(ranks.same(split.shared), ranks.same(split.experts), split.ffn_width)
