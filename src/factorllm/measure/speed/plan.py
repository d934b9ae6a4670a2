"""What a comparison of speeds times."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from factorllm.runs.settings import Chosen, Sequences, Threads, Tokens

SPARE = 16
"""Tokens of context that a model is given beside the longest sequence that is timed."""


class Plan(Chosen):
    """What is timed. Unknown keys are refused.

    Example:
        >>> Plan(prompts=(512,), batches=(1, 8)).names()
        ['prefill 512', 'decode x1', 'decode x8']
    """

    rounds: int = Field(default=7, ge=1, le=10_000)
    """Turns of each model; one alone says nothing of how they differ."""
    prompts: tuple[Tokens, ...] = (512, 2048)
    """Lengths of the prompts of prefill, tokens."""
    context: Tokens = 256
    """Prompt before decoding, tokens."""
    steps: int = Field(default=48, ge=2, le=1_000_000)
    """Steps of decoding that are timed."""
    batches: tuple[Sequences, ...] = (1, 8)
    """Sequences that decode at once."""
    threads: tuple[Threads, ...] = ()
    """Thread counts to choose from; empty for all powers of two up to the number of cores."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of weights that are not quantised."""
    experts: Literal["eager", "batched_mm", "grouped_mm"] | None = None
    """Back end of transformers' experts."""

    def thread_counts(self) -> tuple[int, ...]:
        cores = len(os.sched_getaffinity(0))
        return self.threads or tuple(sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores}))

    def within(self, context: int) -> Plan:
        """The same of a model that reads no more than `context` tokens."""
        prompts = tuple(dict.fromkeys(min(prompt, context // 2) for prompt in self.prompts))
        before, steps = min(self.context, context // 4), min(self.steps, max(context // 8, 2))
        return self.model_copy(update={"prompts": prompts, "context": before, "steps": steps})

    def fitting(self, context: int) -> Plan:
        """The same as it is where models that read `context` tokens can do it, which engines refuse otherwise; else
        what is within."""
        longest = max(*self.prompts, self.context + self.steps)
        return self if longest + SPARE <= context else self.within(context)

    def names(self) -> list[str]:
        """What is timed: `prefill N` for prompts of N tokens, `decode xB` for B sequences at once."""
        return [f"prefill {length}" for length in self.prompts] + [f"decode x{batch}" for batch in self.batches]
