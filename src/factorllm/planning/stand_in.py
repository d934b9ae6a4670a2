"""Models of the right shape without the right weights: what an engine's speed is measured on before there is a student.

Speed does not depend on what the weights are, so a few layers of random ones stand in for the model. They are written
in the file type that is asked, one random block repeated, without reading or computing a single real weight.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import activation, family_of, ffn_layers, keep_first_layers, set_vocabulary
from factorllm.dense.ffn import FFN
from factorllm.dense.names import HEAD, LAYERS, embeddings, layer_prefix
from factorllm.dense.pretrained import parameter_shapes
from factorllm.dense.wrappers import Wrapper
from factorllm.exporting.files import publishing
from factorllm.exporting.ggml import ONLY_GGML, quantize
from factorllm.exporting.header import start_file
from factorllm.exporting.plan import Planned, plan_layout
from factorllm.hosts import HOSTS, Host, StudentFFN, choose_host
from factorllm.hosts.base import GGUFForm
from factorllm.measure.cost import Cost, cost_of
from factorllm.recipe import Shape
from factorllm.runs.disk import IN_TMPDIR

_TILE = 1 << 16  # numbers that are random; the rest of a tensor repeats them
_SPREAD = 0.02  # of the weights, as models are initialised: nothing overflows or becomes denormal


@dataclass(frozen=True)
class StandIn:
    """A student, or the dense model, as shapes.

    Attributes:
        config: of the student.
        shapes: of its tensors by their names in a checkpoint.
    """

    config: PreTrainedConfig
    host: Host
    shapes: dict[str, tuple[int, ...]]
    name: str = "stand-in"
    licence: str | None = None
    wrapper: Wrapper | None = None

    @classmethod
    def of(cls, dense: PreTrainedConfig, shape: Shape) -> StandIn:
        """The student of a shape.

        Args:
            dense: the dense model's config.
            shape: the dense model itself is the shape with every neuron shared.

        Raises:
            FactorLLMError: when no host holds it.
        """
        chosen = choose_host("auto", dense, shape) if shape.experts else HOSTS["dense"]
        return cls(chosen.config(dense, shape), chosen, _student_shapes(dense, shape, chosen))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.shapes)

    @property
    def form(self) -> GGUFForm:
        return self.host.gguf_form(self.config)

    def read(self, name: str) -> Tensor:
        """A tensor without data."""
        return torch.empty(self.shapes[name], device="meta")

    def cost(self) -> Cost:
        return cost_of(self.config, self.host.shape(self.config), head_apart=not self.host.ties_embeddings)

    def layout(self, file_type: str) -> dict[str, Planned]:
        """The tensors of a GGUF file in their order."""
        return plan_layout(self, file_type)

    def file_size(self, file_type: str) -> int:
        """Bytes of the tensors of a GGUF file."""
        return sum(planned.size for planned in self.layout(file_type).values())

    def write(self, path: Path, file_type: str) -> None:
        """Write it as a GGUF file of random weights, with a vocabulary of no words."""
        plan = self.layout(file_type)
        partial = path.with_suffix(".partial")
        writer = start_file(partial, self, file_type, plan)
        _add_vocabulary(writer, self.config.vocab_size)
        with publishing(writer, partial, path, IN_TMPDIR):
            for planned in plan.values():
                writer.write_tensor_data(np.resize(_tile(planned.kind), planned.size))


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first layers only."""
    config = copy.deepcopy(config)
    keep_first_layers(config, layers)
    return config


def with_tokens(config: PreTrainedConfig, tokens: int) -> PreTrainedConfig:
    """The same model with a vocabulary of so many tokens, none of which is special."""
    config = copy.deepcopy(config)
    set_vocabulary(config, tokens)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def _student_shapes(dense: PreTrainedConfig, shape: Shape, host: Host) -> dict[str, tuple[int, ...]]:
    """Shapes of a student's tensors, made from those of the dense model as a conversion makes them."""
    empty = {name: torch.empty(size, device="meta") for name, size in parameter_shapes(dense).items()}
    found = {name: tensor for name, tensor in empty.items() if not name.startswith(LAYERS)}
    if not host.ties_embeddings and HEAD not in found:
        found[HEAD] = found[embeddings(dense)]
    ffn, having = _empty_ffn(dense, shape), ffn_layers(host.config(dense, shape))
    for layer in range(dense.num_hidden_layers):
        prefix = layer_prefix(layer)
        names = [name.removeprefix(prefix) for name in empty if name.startswith(prefix)]
        tensors = {name: empty[prefix + name] for name in names}
        if layer in having:
            tensors = {name: tensor for name, tensor in tensors.items() if not family_of(dense).ffn.holds(name)}
            found |= {prefix + name: tensor for name, tensor in host.ffn_tensors(ffn, dense).items()}
        tensors = host.other_tensors(dense, tensors)
        found |= {prefix + name: tensor for name, tensor in tensors.items()}
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _empty_ffn(dense: PreTrainedConfig, shape: Shape) -> StudentFFN:
    inward = torch.empty(shape.kept_width, dense.hidden_size, device="meta")
    gate = None if family_of(dense).ffn.gate is None else inward
    router = torch.empty(shape.experts, dense.hidden_size, device="meta") if shape.experts else None
    return StudentFFN(FFN(gate, inward, inward.T, activation(dense)), router, shape)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Tokens that the engine needs to have, and nobody reads; of 100,000 a second goes into each list about them."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", *(f"token{i}" for i in range(4, size))][:size])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@cache
def _tile(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes of a tile of random weights in a type."""
    numbers = np.random.default_rng(0).normal(0, _SPREAD, (_TILE // 256, 256)).astype(np.float32)
    data = quantize("stand-in", numbers, kind, None) if kind in ONLY_GGML else gguf.quants.quantize(numbers, kind)
    return data.reshape(-1).view(np.uint8)
