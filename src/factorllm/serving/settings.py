"""How a model is served."""

from __future__ import annotations

from pydantic import Field

from factorllm.engines.base import Options
from factorllm.runs.settings import Chosen, Threads
from factorllm.serving.schedule import Policy


class ServeSettings(Chosen):
    """How a model is served. Unknown keys are refused.

    Example:
        >>> ServeSettings(port=9000, parallel=4).options.batch
        4
    """

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=1, le=65_535)
    """Port to listen on."""
    context: int = Field(default=4096, ge=2, le=1 << 22)  # llama.cpp ends the process where there is room for one
    """Tokens of a conversation."""
    parallel: int = Field(default=1, ge=1, le=256)
    """Conversations at once (llama.cpp)."""
    threads: Threads | None = None
    """Threads (llama.cpp). Default: the engine's choice."""

    in_memory: int | None = Field(default=None, ge=1)
    """Models in memory at once, of a folder with one for each kind of text. Default: all of them."""
    policy: Policy = "belady"
    """Which of them leaves memory for another: the one that the queues need last, or was used longest ago; fifo also
    answers in order, whatever the kind."""
    wait_limit: float = Field(default=30.0, gt=0, le=86_400)
    """Seconds that no request should wait, with models for kinds of text: after half of them it goes first."""

    @property
    def options(self) -> Options:
        return Options(context=self.context, batch=self.parallel, decode_threads=self.threads)
