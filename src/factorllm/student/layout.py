"""Whether a student's files hold the tensors that its config says: all of them, no others, in their shapes."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from factorllm.dense.families import ffn_layers
from factorllm.dense.ffn import FFN
from factorllm.dense.names import HEAD, layer_prefix
from factorllm.dense.pretrained import parameter_shapes
from factorllm.dense.safetensors import TensorFolder
from factorllm.errors import FactorLLMError
from factorllm.hosts import MoeHost, StudentFFN

Shapes = dict[str, tuple[int, ...]]


def check_layout(tensors: TensorFolder, config: PreTrainedConfig, host: MoeHost) -> None:
    """Refuse a student whose weights and config are not of one model.

    Raises:
        FactorLLMError: naming the first tensor that is missing, of another shape, or left over.
    """
    needed = outside_ffns(config, host)
    for index in ffn_layers(config):
        needed |= {layer_prefix(index) + name: shape for name, shape in _ffn(config, host).items()}
    have = set(tensors.names())
    if config.tie_word_embeddings:
        have.discard(HEAD)
    if missing := sorted(needed.keys() - have):
        raise _refusal(tensors, f"{missing[0]} is missing")
    if extra := sorted(have - needed.keys()):
        raise _refusal(tensors, f"{extra[0]} has no place in it and would be left out")
    for name in sorted(have):
        shape, right = tensors.shape(name), needed[name]
        if shape != right and len(shape) == 3 and shape == (right[0], right[2], right[1]) and _transposes(host):
            raise FactorLLMError(
                f"{tensors.label} has {name} with rows and columns in each other's place, as transformers' "
                f"save_pretrained leaves the experts of {config.model_type}, and engines read them otherwise; swap the "
                "last two dimensions of it and of its like in all layers"
            )
        if shape != right:
            raise _refusal(tensors, f"{name} is {shape}, but the config says {right}")


def _transposes(host: MoeHost) -> bool:
    """Whether experts' matrices are transposed on disk."""
    return bool(host.gguf_architecture) and any(stored.transposed for stored in host.gguf_ffn.values())


def _refusal(tensors: TensorFolder, what: str) -> FactorLLMError:
    return FactorLLMError(f"{tensors.label} does not hold one whole model: {what}; make or fetch the checkpoint again")


def outside_ffns(config: PreTrainedConfig, host: MoeHost) -> Shapes:
    """What is not an FFN's has the same names on disk as in transformers."""
    shapes = parameter_shapes(config)
    return {name: tuple(shape) for name, shape in shapes.items() if not host.is_of_ffn(name, config)}


def _ffn(config: PreTrainedConfig, host: MoeHost) -> Shapes:
    shape, d = host.shape(config), config.hidden_size
    with torch.device("meta"):
        inward = torch.empty(shape.kept_width, d)
        ffn = FFN(inward if host.matrices(config) == 3 else None, inward, inward.T)
        student = StudentFFN(ffn, torch.empty(shape.experts, d), shape)
        return {name: tuple(tensor.shape) for name, tensor in host.ffn_tensors(student, config).items()}
