"""Names of the tensors that all causal language models of transformers have, of every family that is read."""

LAYERS = "model.layers."
"""What the names of a decoder layer's tensors begin with."""

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def layer_prefix(index: int) -> str:
    """What the names of one decoder layer's tensors begin with."""
    return f"{LAYERS}{index}."


def place_in_layers(name: str) -> tuple[int, str] | None:
    """The decoder layer that a tensor is in and its part there, such as `mlp`; None for one outside the layers."""
    if not name.startswith(LAYERS):
        return None
    index, part, *_ = name.removeprefix(LAYERS).split(".")
    return int(index), part
