"""Checkpoints that are written while training goes on, for a write takes as long as many steps.

Weights and moments are copied to host memory by `torch.distributed.checkpoint`'s stager in a thread, beside the next
step's forward and backward pass, which change neither; only the optimizer waits for the copy. The same thread then
writes the files that `Trainer` would have written, so that it reads them as ever. A mark in the folder says that they
are not whole yet.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from factorllm.runs.memory import available_memory
from factorllm.runs.output import read_json

_UNFINISHED = "unfinished"
_ROOM = 1.25  # times what is copied, that must be free for it


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copied = Event()
        self._written: Future[None] | None = None

    def begin(self, folder: Path, model: nn.Module, optimizer: dict[str, Any]) -> None:
        """Start to write. Until `wait_for_copy` has returned, nothing may change what is written.

        Args:
            folder: of the checkpoint.
            optimizer: its state, as `state_dict` gives it.
        """
        self.finish()
        (folder / _UNFINISHED).touch()
        self._copied.clear()
        state = {"model": _named(model), "optimizer": optimizer}
        self._written = self._thread.submit(self._write, folder, state)

    def wait_for_copy(self) -> None:
        """Return when weights and moments may change again."""
        if self._written:
            self._copied.wait()

    def finish(self) -> None:
        """Return when the checkpoint is whole.

        Raises:
            OSError: and what else writing it raised.
        """
        written, self._written = self._written, None
        if written:
            written.result()

    def _write(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            copied = BlockingAsyncStager().stage(state)
        finally:
            self._copied.set()
        save_file(copied["model"], folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        torch.save(copied["optimizer"], folder / OPTIMIZER_NAME)
        for name in (SAFE_WEIGHTS_NAME, OPTIMIZER_NAME):
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        (folder / _UNFINISHED).unlink()


def has_room_for_copy(model: nn.Module) -> bool:
    """Whether the machine has memory for another copy of the weights and AdamW's two moments."""
    tensors = _named(model).values()
    learning = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)
    return _ROOM * (sum(tensor.nbytes for tensor in tensors) + 2 * learning) < available_memory()


def _named(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model; of tied weights the first, as safetensors have it."""
    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: kept[name] for name in kept if not (id(kept[name]) in seen or seen.add(id(kept[name])))}


def checkpoints(folder: Path) -> dict[int, Path]:
    """The Trainer's checkpoints by their step, the oldest first, whole or not."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def read_state(checkpoint: Path) -> dict | None:
    """The Trainer's state in a checkpoint; None where that is not whole."""
    return None if (checkpoint / _UNFINISHED).exists() else read_json(checkpoint / TRAINER_STATE_NAME)
