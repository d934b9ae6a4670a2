"""A model's matrices in transformers, as a GGUF file would hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorllm.dense.modules import decoder_layers, experts_of
from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import Checkpoint
from factorllm.exporting.ggml import round_trip
from factorllm.exporting.plan import plan_layout, without_data
from factorllm.exporting.watch import OUT_OF_EXPERTS, linears

_FLOATS = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}


class InFile(NamedTuple):
    """A matrix that is rounded in a file."""

    name: str
    """Its name there."""
    parameter: nn.Parameter
    """What it is made of."""
    kind: Type
    """The type that it takes."""
    columns: Tensor | None
    """The order of its columns there, as `GGUFForm.gguf_columns` has it."""


def types_in_file(model: PreTrainedModel, checkpoint: Checkpoint, file_type: str) -> list[InFile]:
    """The matrices that are rounded in a file.

    Args:
        model: the checkpoint in transformers.
        file_type: one of `FILE_TYPES`.

    Raises:
        FactorLLMError: when a tensor of the file is not found in the model, so that not all could be rounded.
    """
    plan = plan_layout(without_data(checkpoint), file_type)
    wanted = {name: planned.kind for name, planned in plan.items() if planned.kind is not Type.F32}
    found = {name: parameter for name, parameter in _matrices(model, checkpoint) if name in wanted}
    if missing := sorted(wanted.keys() - found.keys()):
        raise FactorLLMError(
            f"{checkpoint.name} cannot be healed as the file that it will be: nothing is known here of {missing[0]}; "
            "leave out --quantize"
        )

    def in_file(name: str, parameter: nn.Parameter) -> InFile:
        columns = checkpoint.form.gguf_columns(name.split(".", 2)[-1], checkpoint.config)
        return InFile(name, parameter, wanted[name], columns)

    once = {id(parameter): in_file(name, parameter) for name, parameter in found.items()}
    return list(once.values())  # tied weights and the parts of a fused matrix are one


def _matrices(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Parameter]]:
    """Names of tensors in the file, and the parameters that they are made of."""
    yield "token_embd.weight", model.get_input_embeddings().weight
    yield "output.weight", model.get_output_embeddings().weight
    for index, layer in enumerate(decoder_layers(model)):
        for name, module in linears(layer, index, checkpoint).items():
            yield f"blk.{index}.{name}", module.weight
        stacked = [name for name in checkpoint.host.gguf_ffn_at(index, checkpoint.config) if "_exps." in name]
        for experts in experts_of(layer):
            inward = experts.gate_up_proj if experts.has_gate else experts.up_proj
            for name in stacked:
                yield f"blk.{index}.{name}", experts.down_proj if name == OUT_OF_EXPERTS else inward


def as_in_file(name: str, tensor: Tensor, kind: Type, columns: Tensor | None = None) -> Tensor:
    """What a file holds of a tensor (..., d), read again: fp32, of the same shape, on its device.

    Args:
        name: for messages.
        kind: the type that it takes, by `types_in_file`; without importance weights.
        columns: their order in the file, by `types_in_file`, which decides what is in a block together.
    """
    if kind in _FLOATS:
        return tensor.to(_FLOATS[kind]).float()
    if columns is not None:
        return as_in_file(name, tensor[..., columns], kind)[..., columns.argsort()]
    back = round_trip(name, tensor.detach().float().cpu().contiguous().numpy(), kind)
    return torch.from_numpy(back).to(tensor.device)
