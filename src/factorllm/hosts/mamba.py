"""Mamba's tensors as GGUF files have them, of every host with such layers."""

from __future__ import annotations

from torch import Tensor

_NAMES = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "D": "ssm_d",
}


def mamba_names(module: str) -> dict[str, str]:
    """The names there by those in the checkpoint, of the part of a layer that is Mamba."""
    return {f"{module}.{name}": there for name, there in _NAMES.items()}


def mamba_content(name: str, tensor: Tensor, groups: int) -> Tensor:
    """What a GGUF file holds of a layer's tensor, as `GGUFForm.gguf_content`; what is not Mamba's stays as it is.

    Args:
        groups: of heads.
    """
    match name.split("."):
        case [_, "A_log"]:
            return -tensor.float().exp()[:, None]
        case [_, "D"]:
            return tensor[:, None]
        case [_, "norm"]:
            return tensor.view(groups, -1)
        case _:
            return tensor
