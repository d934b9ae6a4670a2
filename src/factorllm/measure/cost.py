"""Parameters and FLOPs of a token, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from factorllm.dense.families import ffn_layers, ffn_width, leading_dense
from factorllm.dense.names import HEAD, embeddings
from factorllm.dense.pretrained import parameter_shapes
from factorllm.hosts import host_of
from factorllm.recipe import Shape


@dataclass(frozen=True)
class Cost:
    """What one model holds and runs.

    Attributes:
        ffn_sparsity: share of the dense FFN's neurons that do not run for a token.
        total_parameters: all parameters; a tied embedding counts once. What a host adds only because its engines want
            it, such as zero biases, is left out.
        active_parameters: those that one token uses; of the embedding table, only as the output head.
        flops_per_token: 2 x the weights of all matrix products of one token. The products of queries, keys and values
            with each other, which grow with the context, are the same for every student and are left out.
    """

    ffn_sparsity: float
    total_parameters: int
    active_parameters: int
    flops_per_token: int


def cost_of(config: PreTrainedConfig, shape: Shape, head_apart: bool = False) -> Cost:
    """The cost of a student of `shape` of the dense model that has `config`.

    The dense model itself is the shape with every neuron shared.

    Args:
        config: of the dense model, or of the student.
        head_apart: whether the student's host holds the output head apart from the embeddings, tied or not.
    """
    d, host = config.hidden_size, host_of(config)
    # In a student's own config, the FFNs that are whole are no part of it any more.
    ffns, whole = len(ffn_layers(config)), shape.leading_dense - leading_dense(config)
    outside = {name: size for name, size in parameter_shapes(config).items() if not host.is_of_ffn(name, config)}
    table = outside.pop(embeddings(config)).numel()
    head = outside.pop(HEAD).numel() if HEAD in outside else table
    matrices = sum(size.numel() for size in outside.values() if len(size) > 1)
    vectors = sum(size.numel() for size in outside.values() if len(size) == 1)
    neuron, router = host.matrices(config) * d, shape.experts * d

    matrices += whole * neuron * shape.ffn_width + head
    cut = ffns - whole
    active = matrices + cut * (neuron * shape.active_width + router)
    held = matrices + cut * (neuron * shape.kept_width + router)
    return Cost(
        ffn_sparsity=shape.sparsity * cut / (cut + shape.leading_dense),
        total_parameters=held + vectors + (0 if config.tie_word_embeddings and not head_apart else table),
        active_parameters=active + vectors,
        flops_per_token=2 * active,
    )


def dense_shape(config: PreTrainedConfig) -> Shape:
    """The dense model as a shape: one shared part."""
    width = ffn_width(config)
    return Shape(ffn_width=width, shared_width=width, experts=0, expert_width=width, top_k=0)
