"""Parameters and FLOPs of a token, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from factorllm.dense.families import biased_projections, head_dim, normalises_heads
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
        head_apart: whether the student's host holds the output head apart from the embeddings, tied or not.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * head_dim(config)
    key_value = config.num_key_value_heads * head_dim(config)
    attention = 2 * d * (query + key_value)
    widths = {"q_proj": query, "k_proj": key_value, "v_proj": key_value, "o_proj": d}
    biases = sum(widths[projection] for projection in biased_projections(config))
    head_norms = 2 * head_dim(config) if normalises_heads(config) else 0
    router = shape.experts * d
    head = config.vocab_size * d

    active = layers * (attention + 3 * d * shape.active_width + router) + head
    held = layers * (attention + 3 * d * shape.kept_width + router) + head
    vectors = layers * (2 * d + biases + head_norms) + d
    embedding = 0 if config.tie_word_embeddings and not head_apart else head
    return Cost(
        ffn_sparsity=shape.sparsity,
        total_parameters=held + vectors + embedding,
        active_parameters=active + vectors,
        flops_per_token=2 * active,
    )


def dense_shape(config: PreTrainedConfig) -> Shape:
    """The dense model as a shape: one shared part."""
    width = config.intermediate_size
    return Shape(ffn_width=width, shared_width=width, experts=0, expert_width=width, top_k=0)
