"""The dense FFN that is factorised, where each family keeps it, and what each of its neurons contributes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class FFN:
    """`F(x) = down @ (act(gate @ x) * (up @ x))`, or without a gate `down @ act(up @ x)`, with hidden size d and f
    intermediate neurons.

    Attributes:
        gate: (f, d), or None.
        up: (f, d).
        down: (d, f).
        activation: transformers' name of `act`.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    activation: str = "silu"

    @property
    def width(self) -> int:
        return self.up.shape[0]

    @property
    def triggers(self) -> Tensor:
        """What the activation is of, for each neuron: (f, d)."""
        return self.up if self.gate is None else self.gate

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Those that it has, by their names here."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def part(self, neurons: Tensor | slice) -> FFN:
        """Some of the neurons, in the given order."""
        gate = None if self.gate is None else self.gate[neurons]
        return replace(self, gate=gate, up=self.up[neurons], down=self.down[:, neurons])

    def hidden(self, x: Tensor) -> Tensor:
        """Intermediate activations h(x): (n, d) -> (n, f)."""
        active: Tensor = ACT2FN[self.activation](x @ self.triggers.T)
        return active if self.gate is None else active * (x @ self.up.T)

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
        gate, up, down: names of its matrices there; where gate and up are one matrix, gate over up, both name it. None
            for a gate that there is not.
    """

    slot: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def is_fused(self) -> bool:
        return self.gate == self.up

    @property
    def names(self) -> list[str]:
        """Its tensors by their names in a layer."""
        names = dict.fromkeys((self.gate, self.up, self.down))
        return [f"{self.slot}.{name}.weight" for name in names if name is not None]

    def holds(self, name: str) -> bool:
        """Whether a tensor of a layer, by its name there, is the FFN's."""
        return name.startswith(f"{self.slot}.")

    def of_layer(self, layer: nn.Module, activation: str) -> FFN:
        """The FFN of a layer in transformers."""
        weights = dict(layer.get_submodule(self.slot).named_parameters())
        up, down = weights[f"{self.up}.weight"], weights[f"{self.down}.weight"]
        gate = None if self.gate is None else weights[f"{self.gate}.weight"]
        if self.is_fused:
            gate, up = gate.chunk(2)
        return FFN(gate, up, down, activation)

    def tensors(self, ffn: FFN) -> dict[str, Tensor]:
        """An FFN's tensors by their names in a layer."""
        matrices = list(ffn.matrices.values())
        if self.is_fused:
            matrices[:2] = [torch.cat(matrices[:2])]
        return dict(zip(self.names, matrices, strict=True))
