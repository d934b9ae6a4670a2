"""First step of a layer: run the student's stream through attention, and keep what its FFN reads and computes."""

from __future__ import annotations

from factorllm.convert.task import LayerTask
from factorllm.runs.device import fast_products


def collect(task: LayerTask) -> None:
    """Fill the task's `middle`, `inputs` and `sample`."""
    layer = task.layer
    for run in task.middle.runs():
        with fast_products(task.device, task.workplace.bears_rounding):
            before, beside = task.streams.before.read(run, task.device), task.streams.sequences.beside(run)
            middle, inputs = layer.attend(before, beside)
            sample = layer.ffn.hidden(task.sampled(inputs.view_as(middle), run).flatten(0, 1))
        task.middle.write(run, middle)
        task.inputs.write(run, inputs)
        task.sample.write(run, sample)
        task.tick(run)
