"""Plain transformers."""

from __future__ import annotations

import itertools
import time

import torch
from transformers import Cache, DynamicCache

from factorllm.dense.generate import next_logits
from factorllm.dense.safetensors import load_language_model
from factorllm.engines.base import Engine, Options, random_tokens


class Transformers(Engine):
    def __init__(self, model: str, options: Options):
        if threads := options.prefill_threads or options.decode_threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        more = {"experts_implementation": options.experts} if options.experts else {}
        loaded = load_language_model(model, dtype=options.dtype or "auto", **more)
        self._model = loaded.to(device).eval()
        self._decode_threads, self._prefill_threads = options.decode_threads, options.prefill_threads
        self._seeds = itertools.count()

    def generate(self, tokens: list[int], count: int) -> list[int]:
        cache = self._cache()
        step = self._step(torch.tensor([tokens]), cache)
        made = [step]
        for _ in range(count - 1):
            step = self._step(step, cache)
            made.append(step)
        return torch.cat(made, 1)[0].tolist()

    @torch.no_grad()
    def next_tokens(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        logits = self._model(torch.tensor([tokens], device=self._model.device), logits_to_keep=1).logits[0, -1]
        top = logits.float().log_softmax(-1).topk(count)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def prefill(self, length: int) -> float:
        prompt = self._prompt(1, length)
        self._use_threads(self._prefill_threads)
        start = self._now()
        self._step(prompt, self._cache())
        return self._now() - start

    def decode(self, batch: int, context: int, steps: int) -> float:
        cache = self._cache()
        step = self._step(self._prompt(batch, context), cache)
        self._use_threads(self._decode_threads)
        start = self._now()
        for _ in range(steps):
            step = self._step(step, cache)
        return (self._now() - start) / steps

    @torch.no_grad()
    def _step(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The likeliest next token of each sequence, (batch, 1)."""
        return next_logits(self._model, tokens, cache).argmax(-1, keepdim=True)

    def _cache(self) -> Cache:
        return DynamicCache(config=self._model.config)

    def _prompt(self, batch: int, length: int) -> torch.Tensor:
        vocabulary = self._model.config.vocab_size
        return torch.tensor([random_tokens(length, vocabulary, next(self._seeds)) for _ in range(batch)])

    def _use_threads(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
