"""A student on sequences that nothing was fitted to, where there are images: how far its FFN is from the dense one on
tokens of images and of text."""

from __future__ import annotations

import torch

from factorllm.convert.ridge import GatedHidden
from factorllm.dense.layer import DenseLayer
from factorllm.dense.sequences import Sequences
from factorllm.hosts import Host, StudentFFN
from factorllm.runs.ranks import Ranks
from factorllm.runs.rows import Rows

KINDS = ("text", "image")


def advance_held_out(
    layer: DenseLayer, student: StudentFFN, host: Host, sequences: Sequences, before: Rows, after: Rows, ranks: Ranks
) -> dict[str, float]:
    """Write a student's stream after a layer; of each kind of token, the squared error of its FFN's output relative to
    the dense FFN's on the same inputs, mean over tokens."""
    device, down = layer.ffn.up.device, student.ffn.down.float()
    totals = torch.zeros(len(KINDS), 2, dtype=torch.float64, device=device)
    for run in before.runs():
        stream, beside = before.read(run, device), sequences.beside(run)
        middle, inputs = layer.attend(stream, beside)
        wanted = (layer.ffn.hidden(inputs) @ layer.ffn.down.T).float()
        gates = host.gate_weights(inputs, student.router, student.shape.top_k)
        got = GatedHidden.compute(student.ffn, inputs, gates, student.shape).project(down)
        after.write(run, layer.after(stream, middle, got, beside))
        smallest = torch.finfo(torch.float32).tiny
        errors = (got - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(smallest)
        is_image = sequences.is_image(run).flatten().to(device)
        for total, mask in zip(totals, (~is_image, is_image), strict=True):
            total += torch.stack([errors[mask].sum(), mask.sum()])
    errors, counts = ranks.sum(totals).unbind(1)
    return dict(zip(KINDS, (errors / counts.clamp_min(1)).tolist(), strict=True))
