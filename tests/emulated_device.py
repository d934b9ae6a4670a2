"""Commands on a device that is none: it computes on the CPU and refuses what a GPU would, tensors that lie elsewhere.

`python emulated_device.py` runs the commands of a JSON list from its input, each a list of words.

Built on torch's backends in Python: a tensor of the device holds one of the CPU. What makes tensors out of nothing is
made on the CPU and moved, for a tensor that is held so cannot grow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emulated"
_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
_INDEXES = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)
_FROM_NOTHING = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "full", "linspace", "ones", "zeros")


class Emulated(torch.Tensor):
    """A tensor of the device, which holds one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Emulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def tolist(self) -> list:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __repr__(self) -> str:
        return f"Emulated({self.held})"


def _is_named(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME


def _refuse_elsewhere(operation: Any, args: tuple, kwargs: dict) -> None:
    """As CUDA does: numbers, and what is copied, may lie elsewhere, and indices on the CPU."""
    own = args[:1] + args[2:] if operation in _INDEXES else (args, kwargs)
    tensors = [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Emulated) and tensor.dim()]
    indices_elsewhere = operation in _INDEXES and not isinstance(args[0], Emulated)
    if operation not in _COPIES and (len(elsewhere) not in (0, len(tensors)) or indices_elsewhere):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")


def _run(operation: Any, args: tuple, kwargs: dict) -> Any:
    if operation is _ATEN._has_compatible_shallow_copy_type.default:
        return isinstance(args[0], Emulated) == isinstance(args[1], Emulated)
    _refuse_elsewhere(operation, args, kwargs)
    wanted = kwargs.get("device")
    held_args, held_kwargs = tree_map_only(Emulated, lambda tensor: tensor.held, (args, kwargs))
    if _is_named(wanted):
        held_kwargs["device"] = torch.device("cpu")
    if operation is _ATEN.histc.default:  # a GPU counts integers
        held_args = (held_args[0].float(), *held_args[1:])
    found = operation(*held_args, **held_kwargs)
    here = any(isinstance(leaf, Emulated) for leaf in tree_leaves((args, kwargs)))
    if operation is _ATEN.copy_.default:
        return args[0]
    if not (here if wanted is None else _is_named(wanted)):
        return found
    made = tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, Emulated) else Emulated(tensor), found)
    return return_and_correct_aliasing(operation, args, kwargs, made) if here else made


def _made_on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args, device=None, **kwargs):
        if not _is_named(device):
            return make(*args, device=device, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{make.__name__}: expected a generator of the device")
        return make(*args, **kwargs).to(device)

    return made


def _cholesky(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def solved(matrix: Tensor, *, out: Tensor | None = None) -> Tensor:
        if not isinstance(matrix, Emulated):
            return solve(matrix, out=out)
        found = Emulated(solve(matrix.held))
        return found if out is None else out.copy_(found)

    return solved


def install() -> list[torch.library.Library]:
    """Give this process the device, before factorllm is imported. What is given back must be kept."""
    nothing = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: 1)
    more = {"current_device": lambda: 0, "_is_in_bad_fork": lambda: False, "manual_seed_all": lambda seed: None}
    vars(nothing).update(more, get_amp_supported_dtype=lambda: [torch.bfloat16])
    _setup_privateuseone_for_python_backend(NAME, nothing)
    constructors = torch.utils._device._device_constructors()
    for name in [name for name, made in vars(torch).items() if callable(made) and made in constructors]:
        if not name.endswith("_like"):
            setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    torch.linalg.cholesky = _cholesky(torch.linalg.cholesky)
    torch.inference_mode = lambda mode=True: torch.no_grad()  # its tensors have no views that hold others
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    made, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name in _FROM_NOTHING:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(_ATEN, packet), overload or "default")
        made.impl(name, lambda *args, operation=operation, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    others.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    return [made, others]


def main() -> None:
    """Run the commands; ends at the first that fails."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    libraries = install()
    from factorllm.cli import main as factorllm

    for words in json.load(sys.stdin):
        sys.argv = ["factorllm", *words]
        try:
            factorllm()
        except SystemExit as ended:
            if ended.code:
                raise
    libraries.clear()


if __name__ == "__main__":
    main()
