"""The dense gated FFN that is factorised, where each family keeps it, and what each of its neurons contributes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class FFN:
    """`F(x) = down @ (act(gate @ x) * (up @ x))`, with hidden size d and f intermediate neurons.

    Attributes:
        gate: (f, d).
        up: (f, d).
        down: (d, f).
        activation: transformers' name of `act`.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str = "silu"

    @property
    def width(self) -> int:
        return self.gate.shape[0]

    def part(self, neurons: Tensor | slice) -> FFN:
        """Some of the neurons, in the given order."""
        return replace(self, gate=self.gate[neurons], up=self.up[neurons], down=self.down[:, neurons])

    def hidden(self, x: Tensor) -> Tensor:
        """Intermediate activations h(x): (n, d) -> (n, f)."""
        return ACT2FN[self.activation](x @ self.gate.T) * (x @ self.up.T)

    def neuron_gain(self) -> Tensor:
        """Squared norm of each column of `down`: (f,), fp32."""
        return self.down.float().square().sum(0)


def neuron_energy(hidden: Tensor, gain: Tensor) -> Tensor:
    """Contribution energy of each neuron, `h_j^2 ||down[:, j]||^2`: (n, f), fp32. What is lost if it is dropped."""
    return hidden.float().square().mul_(gain)


@dataclass(frozen=True)
class FFNLayout:
    """Where a decoder layer of a family keeps its FFN.

    Attributes:
        slot: the layer's attribute that is the FFN.
        gate, up, down: names of its matrices there; where gate and up are one matrix, gate over up, both name it.
    """

    slot: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def is_fused(self) -> bool:
        return self.gate == self.up

    def holds(self, name: str) -> bool:
        """Whether a tensor of a layer, by its name there, is the FFN's."""
        return name.startswith(f"{self.slot}.")

    def of_layer(self, layer: nn.Module, activation: str) -> FFN:
        """The FFN of a layer in transformers."""
        weights = dict(layer.get_submodule(self.slot).named_parameters())
        gate, up, down = (weights[f"{name}.weight"] for name in (self.gate, self.up, self.down))
        if self.is_fused:
            gate, up = gate.chunk(2)
        return FFN(gate, up, down, activation)

    def tensors(self, ffn: FFN) -> dict[str, Tensor]:
        """An FFN's tensors by their names in a layer."""
        inputs = {self.gate: torch.cat([ffn.gate, ffn.up])} if self.is_fused else {self.gate: ffn.gate, self.up: ffn.up}
        return {f"{self.slot}.{name}.weight": tensor for name, tensor in (inputs | {self.down: ffn.down}).items()}
