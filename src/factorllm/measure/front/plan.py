"""What a front measures."""

from __future__ import annotations

import os

from pydantic import Field

from factorllm.measure.speed.plan import Plan
from factorllm.runs.settings import Chosen, Threads, Tokens


class FrontPlan(Chosen):
    """What is measured of each file. Unknown keys are refused.

    Example:
        >>> FrontPlan(types=("q4_0",)).speed_plan().names()
        ['prefill 512', 'decode x1']
    """

    types: tuple[str, ...] = ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_nl", "q3_k")
    """Types of the files, as `export` has them."""
    importance_tokens: Tokens = 65_536
    """Tokens of the text that each model is run on, to weigh what counts when it is quantised."""
    gptq: bool = False
    """Round 4-bit types so that errors are made good on the text, which takes minutes a file."""
    perplexity_tokens: Tokens = 4096
    """Tokens of the text's held-out part that perplexity is measured on."""
    rounds: int = Field(default=5, ge=2, le=10_000)
    """Turns of each file."""
    prompt: Tokens = 512
    """Length of the prompts of prefill, tokens."""
    context: Tokens = 256
    """Prompt before decoding, tokens."""
    steps: int = Field(default=48, ge=2, le=1_000_000)
    """Steps of decoding that are timed."""
    threads: Threads | None = None
    """Threads of every file. Default: one a core."""

    def speed_plan(self) -> Plan:
        """How files are timed."""
        threads = self.threads or len(os.sched_getaffinity(0))
        timed = {"prompts": (self.prompt,), "context": self.context, "steps": self.steps, "batches": (1,)}
        return Plan(rounds=self.rounds, threads=(threads,), **timed)

    def within(self, context: int) -> FrontPlan:
        """The same of a model that reads no more than `context` tokens."""
        return self._timing(self.speed_plan().within(context))

    def fitting(self, context: int) -> FrontPlan:
        """The same as it is where models that read `context` tokens can do it, else what is within."""
        return self._timing(self.speed_plan().fitting(context))

    def _timing(self, timed: Plan) -> FrontPlan:
        return self.model_copy(update={"prompt": timed.prompts[0], "context": timed.context, "steps": timed.steps})
