"""First step of a layer: run the student's stream through attention, and keep what its FFN reads and computes."""

from __future__ import annotations

from factorllm.convert.task import LayerTask


def collect(task: LayerTask) -> None:
    """Fill the task's `middle`, `inputs` and `sample`."""
    layer = task.layer
    for run in task.middle.runs():
        middle = layer.attend(task.streams.before.read(run, task.device))
        inputs = layer.ffn_input(middle)
        task.middle.write(run, middle)
        task.inputs.write(run, inputs)
        task.sample.write(run, layer.ffn.hidden(inputs.view_as(middle)[:, :: task.stride]))
        task.tick(run)
