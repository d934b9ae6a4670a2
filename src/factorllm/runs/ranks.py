"""The processes that share a conversion or a healing under `accelerate launch`: each works on its share of the text,
and what is fitted is fitted on what all have seen. Without a launcher there is one process, and it has everything."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from factorllm.errors import FactorLLMError
from factorllm.runs.settings import Settings


class Ranks:
    """This process among those that were launched together.

    Args:
        settings: with a device, on which one process works alone; of several each has its own of that kind.
    """

    def __init__(self, settings: Settings):
        self._state = PartialState(cpu=settings.torch_device.type == "cpu")
        self.device = settings.torch_device if self.count == 1 else self._state.device

    @property
    def count(self) -> int:
        return self._state.num_processes

    @property
    def index(self) -> int:
        return self._state.process_index

    @property
    def is_main(self) -> bool:
        return self._state.is_main_process

    def console(self, wanted: Console | None) -> Console:
        """Where this process shows progress: one of several speaks, and says that it is not alone."""
        if wanted is None or not self.is_main:
            return Console(quiet=True)
        if self.count > 1:
            wanted.print(f"{self.count} processes share the work")
        return wanted

    def share(self, sequences: int, step: int) -> slice:
        """The sequences of this process, cut where batches of `step` sequences end.

        Raises:
            FactorLLMError: when a process would get none.
        """
        batches = -(-sequences // step)
        if batches < self.count:
            raise FactorLLMError(
                f"{self.count} processes cannot share {sequences} calibration sequences, which are {batches} batches "
                f"of {step}; use more --tokens or a smaller --num_processes"
            )
        first, last = (min(batches * number // self.count * step, sequences) for number in (self.index, self.index + 1))
        return slice(first, last)

    def main_first(self) -> AbstractContextManager:
        """A block that the main process runs before the others."""
        return self._state.main_process_first()

    def wait(self) -> None:
        """Go on when every process is here."""
        self._state.wait_for_everyone()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        return self.sum(tensor).div_(self.count)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one after the other, which need not be equally many: (n, ...)."""
        if self.count == 1:
            return tensor
        rows = [0] * self.count
        dist.all_gather_object(rows, len(tensor))
        parts = [tensor.new_empty(n, *tensor.shape[1:]) for n in rows]
        parts[self.index] = tensor.contiguous()
        for number, part in enumerate(parts):
            dist.broadcast(part, src=number)
        return torch.cat(parts)

    def same(self, tensor: Tensor) -> Tensor:
        """The main process's tensor; what another one computed may differ in the last digit."""
        if self.count == 1:
            return tensor
        sent = tensor.to(self.device).contiguous()
        dist.broadcast(sent, src=0)
        return sent.to(tensor.device)
