"""What a function of the Python API meets in its caller's process, a notebook's often: torch set otherwise, and random
numbers that others draw too."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

_ONE_AT_A_TIME = threading.RLock()
"""Of threads: torch's default dtype is all theirs, and transformers puts other functions in the place of its own while
it loads a model."""


@contextmanager
def apart() -> Iterator[None]:
    """Compute as in a process of its own, and one thread at a time. Default dtype and device, gradients, inference mode
    and autocast are torch's in the block, whatever the caller has set; after it they are the caller's again, and so are
    random numbers."""
    with _ONE_AT_A_TIME, ExitStack() as stack:
        _keep_random_numbers(stack)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # it is looked at in each call of torch, where it is set
            stack.enter_context(torch.device("cpu"))
        yield


def _keep_random_numbers(stack: ExitStack) -> None:
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
