"""Names of the tensors that all causal language models of transformers have, of every family that is read."""

LAYERS = "model.layers."
"""What the names of a decoder layer's tensors begin with."""

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def layer_prefix(index: int) -> str:
    """What the names of one decoder layer's tensors begin with."""
    return f"{LAYERS}{index}."


def part_of_layer(name: str) -> str | None:
    """The part of a decoder layer that a tensor is in, such as `mlp`; None for one outside the layers."""
    return name.removeprefix(LAYERS).split(".")[1] if name.startswith(LAYERS) else None
