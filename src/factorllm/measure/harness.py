"""lm-evaluation-harness's model, asked for less: head and softmax only where a continuation is scored."""

from __future__ import annotations

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from factorllm.dense.opening import opened
from factorllm.errors import FactorLLMError

_BATCH_TOKENS = 2048

Request = tuple[tuple[str, str], list[int], list[int]]
"""What lm-eval asks: context and continuation as text, and the tokens of each."""


class Harness(HFLM):
    """`HFLM` with the same scores. Where a vocabulary is large and a model small, most of its time goes into logits of
    tokens that no one asks for, and into contexts that are asked with each of their continuations.

    Prompts are read as the model is given them in use (`opened`): the end token that some tokenizers put behind each
    text would stand between a prompt and its answer, and in the place of an answer's last token.
    """

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_
    ) -> list[int]:
        if add_special_tokens is False:
            return super().tok_encode(string, add_special_tokens, left_truncate_len)
        return opened(self.tokenizer, string)[-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_
    ) -> tuple[Tensor, Tensor]:
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            room_for_prompt(self.max_length, request.args[1]["max_gen_toks"])
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **how) -> Tensor:
        """Without the penalty for repeating that a generation config may say: llama.cpp is asked without it too."""
        return super()._model_generate(context, max_length, stop, **{"repetition_penalty": 1.0} | how)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether it is what greedy decoding gives."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, ((_, text), context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise FactorLLMError(
                    f"the answer {text[:40]!r} has {len(continuation)} tokens, more than the {self.max_length} of the "
                    "model's context; leave the question out"
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            sharing.setdefault(tuple(kept[:-1]), []).append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in _batches(sorted(sharing, key=len, reverse=True)):
                asked = [
                    (row, len(tokens) - len(requests[number][2]), number)
                    for row, tokens in enumerate(batch)
                    for number in sharing[tokens]
                ]
                first = min(start for _, start, _ in asked)
                scores = self._log_probabilities(batch, first)
                for row, start, number in asked:
                    answers[number] = _answer(scores[row, start - first : len(batch[row]) - first], requests[number][2])
                bar.update(len(asked))
        return answers

    def _log_probabilities(self, batch: list[tuple[int, ...]], first: int) -> Tensor:
        """Of the tokens after each position from `first` on: (sequences, longest - first, vocabulary), fp32."""
        # Padding comes after what is scored, so it needs no mask. It is not of the document, by whose kinds adapters
        # are mixed.
        rows = [torch.tensor(tokens) for tokens in batch]
        inputs = pad_sequence(rows, batch_first=True, padding_value=self.eot_token_id or 0).to(self.device)
        with torch.inference_mode():
            return self.model(inputs, logits_to_keep=len(batch[0]) - first).logits.float().log_softmax(-1)


def room_for_prompt(context: int, answer: int) -> int:
    """Tokens that are left of a context beside an answer.

    Raises:
        FactorLLMError: when there are none.
    """
    if context <= answer:
        raise FactorLLMError(
            f"an answer may have {answer} tokens, and the model's context has {context}; leave the task out"
        )
    return context - answer


def _batches(inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Inputs, the longest first, in batches of about `_BATCH_TOKENS` tokens."""
    batches, at = [], 0
    while at < len(inputs):
        size = max(_BATCH_TOKENS // len(inputs[at]), 1)
        batches.append(inputs[at : at + size])
        at += size
    return batches


def _answer(scores: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(tokens, vocabulary) -> the sum of the continuation's log-probabilities, and whether each is the largest."""
    tokens = torch.tensor(continuation, device=scores.device)
    total = scores.gather(1, tokens[:, None]).sum().item()
    return total, bool((scores.argmax(1) == tokens).all())
