"""Speculative decoding that pays: a student drafts, its dense model verifies, in llama.cpp's own loop.

The text is the dense model's. Whether it comes sooner is measured before serving, on a short sample: what a round of
the loop costs, and how often the student says what the dense model says. From these follow how long a draft may be, how
sure the student must be of its next token, and a forecast; where that is too low, nothing is drafted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from factorllm.engines.base import Options
from factorllm.engines.llamacpp import open_server, server_params
from factorllm.engines.llamacpp_client import completion
from factorllm.errors import FactorLLMError

WORTH = 1.05
"""Forecast below which nothing is drafted."""

_LONGEST = 16  # tokens of a draft
_SUREST = 0.95  # what the student is asked for at most: llama.cpp compares rounded numbers
_TOKENS = 48  # of each text of the sample
_LENGTHS = (1, 4)  # drafts that the costs are measured with

SAMPLE = (
    "The river rises in the mountains and flows through three countries before it reaches the sea. In spring,",
    'def read_table(path, separator=\',\'):\n    """Read a file into a list of dictionaries."""\n',
    "Question: Why do leaves change their colour in autumn?\nAnswer:",
    "How to repair a bicycle tyre:\n\n1. Take the wheel off.\n2.",
)
"""Texts that are gone on with to measure."""


@dataclass(frozen=True)
class Drafting:
    """How the student drafts.

    Attributes:
        model: its GGUF file.
        longest: tokens of a draft at most.
        sure: a draft ends before a token that the student gives a lower probability.
    """

    model: Path
    longest: int
    sure: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What a round of the loop costs, in steps of the dense model alone, and what it brings.

    Attributes:
        acceptance: how often the dense model takes a drafted token whose forerunners it took.
        round: a round beside its drafts. It is more than 1: llama.cpp lets the student read again what was verified.
        token: each drafted token: drafting, verifying, and reading it again.
    """

    acceptance: float
    round: float
    token: float

    def speed_up(self, longest: int) -> float:
        """Over the dense model alone, with drafts of so many tokens (Leviathan et al., arXiv 2211.17192, theorem 3.8).

        A round brings the accepted drafts and one token of the dense model's own.
        """
        brought = sum(self.acceptance**i for i in range(longest + 1))
        return brought / (self.round + longest * self.token)

    def best(self) -> tuple[int, float]:
        """Length of drafts that is forecast to be fastest, and its forecast."""
        longest = max(range(1, _LONGEST + 1), key=self.speed_up)
        return longest, self.speed_up(longest)

    def sure(self, longest: int) -> float:
        """Probability below which the next draft costs more than it brings (SpecDec++, arXiv 2405.19715).

        A token that the dense model takes with probability p brings p tokens; what it costs would bring
        speed_up * token of them.
        """
        return min(self.speed_up(longest) * self.token, _SUREST)


@dataclass(frozen=True)
class Trial:
    """The sample with drafts, and without them in turns.

    Attributes:
        alone, drafted: milliseconds.
        tokens: decoded.
        drafts, accepted: tokens that were drafted and taken; drafts is 0 where llama.cpp did not draft.
    """

    alone: float
    drafted: float
    tokens: int
    drafts: int
    accepted: int

    @property
    def speed_up(self) -> float:
        return self.alone / self.drafted

    @property
    def rate(self) -> float:
        """Tokens a second of the dense model alone."""
        return 1000 * self.tokens / self.alone

    @property
    def round(self) -> float:
        """What a round costs, in steps of the dense model alone: each brings one token beside the accepted."""
        return self.drafted / (self.tokens - self.accepted) / (self.alone / self.tokens)


def lossless_params(dense: Path, options: Options, drafting: Drafting | None):
    """Parameters of a server of the dense model, with a student that drafts."""
    import xllamacpp

    params = server_params(str(dense), options)
    if drafting is not None:
        draft = params.speculative.draft
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        draft.mparams.path = str(drafting.model)
        draft.n_max, draft.p_min = drafting.longest, drafting.sure
        draft.cpuparams.n_threads = params.cpuparams.n_threads
        draft.cpuparams_batch.n_threads = params.cpuparams_batch.n_threads
    return params


def decide(dense: Path, student: Path, threads: int | None, say: Callable[[str], None]) -> Drafting | None:
    """Whether drafts pay, and how the student should draft; None where they do not. Says why.

    The forecast of the formula is only believed where the sample itself, drafted so, is that much faster.

    Raises:
        FactorLLMError: when llama.cpp cannot load one of the files, or does not draft for them.
    """
    options = Options(context=512, decode_threads=threads)
    alone = open_server(lossless_params(dense, options, None), f"load {dense}")

    def tried(longest: int, sure: float = 0.0) -> Trial:
        drafts = open_server(lossless_params(dense, options, Drafting(student, longest, sure)), f"load {student}")
        return try_out(alone.listening_address, drafts.listening_address)

    short = tried(_LENGTHS[0])
    if not short.drafts:
        raise FactorLLMError(
            f"llama.cpp does not let {student} draft for {dense}: their vocabularies are not the same, or the state of "
            f"{dense} cannot be taken back; give the model that {student} was made of, or serve it without --lossless"
        )
    costs = costs_of(short, tried(_LENGTHS[1]))
    longest, forecast = costs.best()
    say(
        f"forecast: {forecast:.2f} x the dense model alone ({short.rate:.1f} tokens/s), drafts of up to {longest}; "
        f"{costs.acceptance:.0%} of drafted tokens accepted, each at {costs.token:.2f} steps of the dense model, and a "
        f"round at {costs.round:.2f}"
    )
    if forecast >= WORTH:
        # What the student says of how sure it is may be wrong, so drafts of full length are tried too.
        measured = {sure: tried(longest, sure).speed_up for sure in (0.0, costs.sure(longest))}
        sure = max(measured, key=measured.__getitem__)
        say(f"on the sample: {measured[sure]:.2f} x, drafting while the student is {sure:.0%} sure of the next token")
        if measured[sure] >= WORTH:
            return Drafting(student, longest, sure)
    say(f"drafting is off, for it does not bring {WORTH} x; the dense model is served alone")
    return None


def costs_of(short: Trial, long: Trial) -> Costs:
    """What a round and a draft cost, from trials with drafts of one token and of several."""
    token = max(long.round - short.round, 0.0) / (_LENGTHS[1] - _LENGTHS[0])
    return Costs(short.accepted / short.drafts, max(short.round - token, 1.0), token)


def try_out(alone: str, drafts: str) -> Trial:
    """The sample, decoded by a server of the dense model and by one that drafts, in turns.

    Args:
        alone, drafts: their addresses.
    """
    found = [(timings(alone, text), timings(drafts, text)) for text in SAMPLE]
    return Trial(
        alone=sum(one["predicted_ms"] for one, _ in found),
        drafted=sum(two["predicted_ms"] for _, two in found),
        tokens=sum(two["predicted_n"] for _, two in found),
        drafts=sum(two.get("draft_n", 0) for _, two in found),
        accepted=sum(two.get("draft_n_accepted", 0) for _, two in found),
    )


def timings(address: str, text: str, tokens: int = _TOKENS) -> dict:
    """What llama.cpp says of the time that so many more tokens took, and of drafts among them."""
    return completion(address, text, tokens)["timings"]


def measured_by(address: str) -> str:
    """What a server has measured since it was started, from its counters."""
    with urlopen(f"{address}/metrics") as reply:
        lines = reply.read().decode()
    counters = dict(re.findall(r"^llamacpp:(\w+) (\S+)$", lines, re.MULTILINE))
    tokens, seconds, drafts, accepted = (
        float(counters[name])
        for name in (
            "tokens_predicted_total",
            "tokens_predicted_seconds_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        )
    )
    said = f"measured: {tokens:.0f} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
    return f"{said}, {accepted:.0f} of {drafts:.0f} drafts accepted" if drafts else said
