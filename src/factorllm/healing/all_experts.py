"""The teacher's gradient for routers, by way of all experts (after DenseMixer).

A router's choice has no slope. Where its host weights the picked experts by constants, as one that takes the softmax
over one selected expert does, the teacher's loss says nothing to it. So the gradient is that of
`y = sum_i [z_i + p_i - sg(p_i)] E_i(x)`, with z the choice, p the softmax of the unflattened logits and sg no gradient:
what the loss would gain by a little more of each expert, picked or not. What is computed forward is the same: `sum_i
z_i E_i(x)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.student.routers import Routers


def learn_from_all_experts(model: PreTrainedModel, routers: Routers) -> None:
    """From now on the gradient of each router's choice is that of all experts. They are run on all tokens for it.

    Args:
        routers: of this model, flattened.
    """
    blocks = [block for block in model.modules() if any(child in routers.modules for child in block.children())]
    for block in blocks:
        block.experts.register_forward_pre_hook(_without_gates)
        block.experts.register_forward_hook(_Learning(routers))


def _without_gates(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden_states, top_k_index, top_k_weights = inputs
    return hidden_states, top_k_index, top_k_weights.detach()


class _Learning:
    """What is done after a layer's experts.

    Args:
        routers: the last of which to run was this layer's.
    """

    def __init__(self, routers: Routers):
        self._routers = routers

    def __call__(self, experts: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        chances = self._routers.latest().softmax(-1)
        return _AsIfMixed.apply(output, chances, _each(experts, *inputs, chances.shape[1]))


@torch.no_grad()
def _each(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, count: int) -> Tensor:
    """Each expert's output, weighted as if it were the token's first: (N, n, d) in autocast's dtype."""
    device, first = hidden_states.device.type, top_k_weights[:, :1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    columns = (torch.full_like(top_k_index[:, :1], expert) for expert in range(count))
    return torch.stack([experts.forward(hidden_states, column, first).to(dtype) for column in columns])


class _AsIfMixed(torch.autograd.Function):
    """The experts' output as it is, (n, d), whose gradient goes to their chances (n, N) too."""

    @staticmethod
    def forward(ctx, output: Tensor, chances: Tensor, each: Tensor) -> Tensor:
        ctx.save_for_backward(each)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor | None, ...]:
        (each,) = ctx.saved_tensors
        return above, torch.stack([(above * expert).sum(-1) for expert in each], dim=-1), None
