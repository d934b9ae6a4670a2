"""Names of the tensors that all causal language models of transformers have, of every family that is read."""

from transformers import PreTrainedConfig

LAYERS = "model.layers."
"""What the names of a decoder layer's tensors begin with."""

_BACKBONE = "backbone."
HEAD = "lm_head.weight"


def embeddings(config: PreTrainedConfig) -> str:
    """The name of the embedding table."""
    return f"model.{'embeddings' if config.model_type == 'nemotron_h' else 'embed_tokens'}.weight"


def without_backbone(stored: str) -> str:
    """The name in transformers of a tensor of Nemotron-H, whose makers call the decoder otherwise."""
    return f"model.{stored.removeprefix(_BACKBONE)}" if stored.startswith(_BACKBONE) else stored


def layer_prefix(index: int) -> str:
    """What the names of one decoder layer's tensors begin with."""
    return f"{LAYERS}{index}."


def place_in_layers(name: str) -> tuple[int, str] | None:
    """The decoder layer that a tensor is in and its part there, such as `mlp`; None for one outside the layers."""
    if not name.startswith(LAYERS):
        return None
    index, part, *_ = name.removeprefix(LAYERS).split(".")
    return int(index), part
