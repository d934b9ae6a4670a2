"""Out of memory: fewer sequences at once from then on, in the same batches, and training goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from factorllm.runs.output import read_json
from factorllm.runs.workspace import write_json


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller part of a batch may fit."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


class MicroBatch:
    """How many sequences one process runs at once. It is kept in a file, for a run that goes on has no more memory.

    Args:
        path: of the file.
        wanted: sequences at once while all fits.
        say: called with a line for each time that there must be fewer.
    """

    def __init__(self, path: Path, wanted: int, say: Callable[[str], None]):
        self._path, self._say = path, say
        self.size = (read_json(path) or {"sequences": wanted})["sequences"]

    def halve(self) -> int:
        """Half as many from now on; 0, which is kept nowhere, where it is one already."""
        if self.size > 1:
            self._say(f"out of memory with {self.size} sequences at once: {self.size // 2} from here on, same batches")
            self.size //= 2
            write_json(self._path, {"sequences": self.size})
            return self.size
        return 0

    def parts(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The rows of `inputs` in parts of one size, at most `size` each, so that their losses count the same."""
        rows = len(inputs["input_ids"])
        size = next(size for size in range(min(self.size, rows), 0, -1) if rows % size == 0)
        if size == rows:
            return [inputs]
        return [{name: tensor[at : at + size] for name, tensor in inputs.items()} for at in range(0, rows, size)]
