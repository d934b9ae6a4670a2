"""Answers of a model, held to what may be answered: greedily, among the tokens that still lead to an allowed one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from factorllm.dense.generate import next_logits
from factorllm.dense.opening import opened
from factorllm.engines import EngineProcess
from factorllm.errors import FactorLLMError
from factorllm.measure.chain.plan import Question
from factorllm.text.sampling import special_tokens


class ServedAnswers:
    """Of a file, by llama.cpp, whose grammar lets through nothing but what may be answered.

    Args:
        process: llama.cpp with the model.
        context: tokens that the server was given room for.
        ends: whether llama.cpp puts an end token behind each text; an answer does not come after one.
    """

    def __init__(self, process: EngineProcess, context: int, ends: bool):
        self._process, self._context, self._ends = process, context, ends

    def __call__(self, question: Question) -> str:
        tokens, count = self._process.tokenize(question.prompt, special=True), _tokens(question)
        tokens = tokens[:-1] if self._ends else tokens
        _check_room(len(tokens), count, self._context, question)
        grammar = None if isinstance(question.allowed, int) else grammar_of(question.allowed)
        return _one_line(self._process.answer(tokens, count, grammar))


class LoadedAnswers:
    """Of a model that is loaded in transformers: the tokens that llama.cpp's grammar would let through, by their text.

    What the cache holds of the prompt before is kept, where the cache can be cut.

    Args:
        mixes: whether the model has adapters that are mixed by what a prompt says. What one prompt has in the cache is
            then not what another one would.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mixes: bool = False):
        self._model, self._tokenizer, self._mixes = model, tokenizer, mixes
        self._context: int = model.config.get_text_config().max_position_embeddings
        self._special = special_tokens(tokenizer)
        self._texts = texts_of_tokens(tokenizer)
        self._ids: dict[str, list[int]] = defaultdict(list)
        for token, text in self._texts.items():
            self._ids[text].append(token)
        self._spelled = {"": True}
        self._cache, self._held = DynamicCache(config=model.config), list[int]()

    @torch.inference_mode()
    def __call__(self, question: Question) -> str:
        tokens, count = opened(self._tokenizer, question.prompt), _tokens(question)
        _check_room(len(tokens), count, self._context, question)
        if isinstance(question.allowed, int):
            return self._line(tokens, count)
        return self._choice(tokens, [f" {answer}\n" for answer in question.allowed])

    def _choice(self, tokens: list[int], left: list[str]) -> str:
        for line in left:
            if not self._is_spelled(line):
                raise FactorLLMError(
                    f"the model has no tokens that make the answer {line.strip()!r}, a character at a time or more; "
                    "write it in others, or ask a .gguf file"
                )
        written = ""
        while len(left) > 1:
            leading = sorted(token for text in self._beginnings(left, len(written)) for token in self._ids[text])
            token = leading[int(self._logits(tokens)[leading].argmax())]
            tokens, written = [*tokens, token], written + self._texts[token]
            left = [line for line in left if line.startswith(written)]
        return left[0].strip()

    def _beginnings(self, lines: list[str], start: int) -> set[str]:
        """Texts of tokens that lines go on with from a place, and after which they can be ended."""
        pieces = {(line[start:end], line[end:]) for line in lines for end in range(start + 1, len(line) + 1)}
        return {text for text, rest in pieces if text in self._ids and self._is_spelled(rest)}

    def _is_spelled(self, text: str) -> bool:
        """Whether tokens can make a text."""
        if text not in self._spelled:
            halves = ((text[:end], text[end:]) for end in range(1, len(text) + 1))
            self._spelled[text] = any(half in self._ids and self._is_spelled(rest) for half, rest in halves)
        return self._spelled[text]

    def _line(self, tokens: list[int], count: int) -> str:
        made: list[int] = []
        for _ in range(count):
            token = int(self._logits(tokens + made).argmax())
            made.append(token)
            if token in self._special or "\n" in self._texts.get(token, ""):
                break
        return _one_line(self._tokenizer.decode(made, skip_special_tokens=True))

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        """After all tokens: (vocabulary,), fp32."""
        plain = all(type(layer) is DynamicLayer for layer in self._cache.layers)
        kept = _common(self._held, tokens[:-1]) if plain else 0
        if self._mixes and kept < len(self._held):
            kept = 0
        if not kept:
            self._cache = DynamicCache(config=self._model.config)
        elif kept < len(self._held):
            self._cache.crop(kept - len(self._held))
        logits = next_logits(self._model, torch.tensor([tokens[kept:]]), self._cache)[0].float()
        self._held = tokens
        if not logits.isfinite().all():
            raise FactorLLMError(
                "the model computes NaN or infinity where it is to answer; use --dtype float32, or leave out --chain"
            )
        return logits


def grammar_of(answers: Iterable[str]) -> str:
    """GBNF of a line that holds one of the answers."""
    return "root ::= " + " | ".join(json.dumps(f" {answer}\n", ensure_ascii=False) for answer in answers)


def texts_of_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """What each token adds to a text, but for special ones and for parts of a character."""
    (anchor,) = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    plain = sorted(set(range(len(tokenizer))) - special_tokens(tokenizer))
    before, *texts = tokenizer.batch_decode(
        [[anchor], *([anchor, token] for token in plain)], clean_up_tokenization_spaces=False
    )
    added = {token: text.removeprefix(before) for token, text in zip(plain, texts, strict=True)}
    return {token: text for token, text in added.items() if text and "\N{REPLACEMENT CHARACTER}" not in text}


def _tokens(question: Question) -> int:
    """Tokens that an answer has at most: one for each byte."""
    if isinstance(question.allowed, int):
        return question.allowed
    return max(len(answer.encode()) for answer in question.allowed) + 2


def _check_room(prompt: int, answer: int, context: int, question: Question) -> None:
    if prompt + answer > context:
        raise FactorLLMError(
            f"a prompt has {prompt} tokens and its answer may have {answer}, more than the {context} of the model's "
            f"context (it ends with {question.prompt[-40:]!r}); shorten the examples or the document"
        )


def _one_line(text: str) -> str:
    return text.partition("\n")[0].strip()


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    same = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        same += 1
    return same
