"""The dense gated FFN that is factorised, and what each of its neurons contributes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class FFN:
    """`F(x) = down @ (silu(gate @ x) * (up @ x))`, with hidden size d and f intermediate neurons.

    Attributes:
        gate: (f, d).
        up: (f, d).
        down: (d, f).
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def width(self) -> int:
        return self.gate.shape[0]

    def part(self, neurons: Tensor | slice) -> FFN:
        """Some of the neurons, in the given order."""
        return FFN(self.gate[neurons], self.up[neurons], self.down[:, neurons])

    def hidden(self, x: Tensor) -> Tensor:
        """Intermediate activations h(x): (n, d) -> (n, f)."""
        return silu(x @ self.gate.T) * (x @ self.up.T)

    def neuron_gain(self) -> Tensor:
        """Squared norm of each column of `down`: (f,), fp32."""
        return self.down.float().square().sum(0)


def neuron_energy(hidden: Tensor, gain: Tensor) -> Tensor:
    """Contribution energy of each neuron, `h_j^2 ||down[:, j]||^2`: (n, f), fp32. What is lost if it is dropped."""
    return hidden.float().square().mul_(gain)
