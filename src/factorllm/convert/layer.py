"""One layer of one student, from the first step to the last."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from factorllm.convert.advance import advance
from factorllm.convert.collect import collect
from factorllm.convert.fit_router import fit_layer_router
from factorllm.convert.partition import Partition
from factorllm.convert.restore import restore
from factorllm.convert.split import split_neurons
from factorllm.convert.task import LayerTask
from factorllm.convert.tune import tune_layer
from factorllm.dense.ffn import neuron_energy
from factorllm.hosts import StudentFFN


def passes(tune: int) -> int:
    """Times that a conversion goes over the calibration tokens: collect, restore, advance; and to tune, once before
    the passes that tune."""
    return 3 + (1 + tune if tune else 0)


def convert_layer(task: LayerTask) -> tuple[StudentFFN, Partition, dict]:
    """Factorise the layer on the student's own hidden states and write the stream after it.

    Returns:
        The student's FFN, which neurons are where in it, and the layer's statistics: `router_agreement` (share of
        the router's picks that the prior makes too, on tokens it was not fitted on), `energy_kept` (share of the
        dense FFN's contribution energy that runs, mean over the sampled tokens), `expert_load` (share of tokens
        that run each expert), `ridge_strength`, and `stream_error` (squared error of the stream after the
        layer relative to the teacher's, mean over the calibration tokens).
    """
    collect(task)
    split = split_neurons(task)
    kept = task.layer.ffn.part(split.order.to(task.device))
    router, agreement = (None, None) if task.recipe.is_prune else fit_layer_router(task, split, kept)
    energy_kept = _energy_kept(task, split, router)
    if task.workplace.tune:
        kept = tune_layer(task, kept, router)
    down, strength, load = restore(task, kept, router)
    error = advance(task, router, down)
    task.remove_arrays()
    statistics = {
        "router_agreement": agreement,
        "energy_kept": energy_kept,
        "expert_load": load,
        "ridge_strength": strength,
        "stream_error": error,
    }
    student = replace(kept, down=down.to(kept.down.dtype))
    return StudentFFN(student, router, task.shape), split, statistics


def _energy_kept(task: LayerTask, split: Partition, router: Tensor | None) -> float:
    """Share of the contribution energy that the shared part and the picked experts hold."""
    sample = task.sample
    total, gain = torch.zeros((), dtype=torch.float64, device=task.device), task.layer.ffn.neuron_gain()
    for run in sample.runs():
        energy = neuron_energy(task.stored_tokens(sample, run), gain)
        runs = energy[:, split.shared].sum(1)
        if router is not None:
            picked = task.gates(task.tokens(task.inputs, run, sampled=True), router) > 0
            runs += (split.expert_sums(energy) * picked).sum(1)
        total += (runs / energy.sum(1).clamp_min(torch.finfo(energy.dtype).tiny)).sum()
    return task.ranks.sum(total).item() / (sample.sequences * sample.length)
