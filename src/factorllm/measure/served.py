"""A GGUF file as lm-evaluation-harness's model: what people run, as they run it, through llama.cpp's server."""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from factorllm.engines import EngineProcess
from factorllm.errors import FactorLLMError
from factorllm.measure.harness import Request, room_for_prompt


class Served(TemplateLM):
    """Texts are cut by llama.cpp, and continued and scored by its server, one after the other.

    Args:
        process: llama.cpp with the model.
        context: tokens that the server was given room for.
        begin: id of the token that stands for an empty context.
        ends: whether llama.cpp puts an end token behind each text; behind a prompt there is none, nor an answer.
    """

    def __init__(self, process: EngineProcess, context: int, begin: int, ends: bool):
        super().__init__()
        self._process, self._context, self._begin, self._ends = process, context, begin, ends

    @property
    def eot_token_id(self) -> int:
        return self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        special = add_special_tokens is not False
        tokens = self._process.tokenize(string, special=special)
        return tokens[:-1] if special and self._ends else tokens

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether it is what greedy decoding gives."""
        answers = []
        for (_, text), context, continuation in tqdm(
            requests, disable=disable_tqdm, desc="Running loglikelihood requests"
        ):
            room = self._context - len(continuation)
            if room < 1:
                raise FactorLLMError(
                    f"the answer {text[:40]!r} has {len(continuation)} tokens, and the model's context has "
                    f"{self._context}; leave the question out"
                )
            found = self._process.score(context[-room:], continuation)
            greedy = [likeliest for _, likeliest in found] == continuation
            answers.append((sum(value for value, _ in found), greedy))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to where each request wants its answer to end."""
        written = []
        for prompt, wanted in tqdm(
            [request.args for request in requests], disable=disable_tqdm, desc="Running generate_until requests"
        ):
            count = wanted["max_gen_toks"]
            room = room_for_prompt(self._context, count)
            written.append(self._process.complete(self.tok_encode(prompt)[-room:], count, wanted["until"]))
        return written

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("none of our tasks asks for the probability of whole texts")
