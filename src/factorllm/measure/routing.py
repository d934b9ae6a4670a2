"""Which experts run for which text: whether they specialise, as FactorLLM (arXiv 2408.11855) says of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorllm.dense.families import ffn_layers
from factorllm.dense.opening import opened, opening_of
from factorllm.dense.safetensors import read_tokenizer
from factorllm.errors import FactorLLMError, refusing
from factorllm.student.read import load_student
from factorllm.student.routers import Routers
from factorllm.text.documents import whole_characters


@dataclass(frozen=True)
class Specialisation:
    """How much the experts that run depend on the kind of text.

    Attributes:
        loads: for each kind of text, each expert's share of the tokens: (FFNs, N), fp32.
        between: how far the loads of two texts of different kinds are apart, 0 to 1: their total variation as
            distributions over experts, mean over FFNs and pairs.
        within: the same for the two halves of one text, which are as long as the texts of `between`.
    """

    loads: dict[str, Tensor]
    between: float
    within: float


@torch.inference_mode()
def expert_picks_for(model: PreTrainedModel, routers: Routers, tokens: Tensor) -> Tensor:
    """Which experts run for each token of one text: (n,) -> (n, FFNs, N), bool."""
    routers.start()
    model(tokens[None].to(model.device), use_cache=False)
    return routers.picks().cpu()


@dataclass(frozen=True)
class RoutedPrompt:
    """A text and the experts that ran for it in one layer.

    Attributes:
        pieces: each token as it reads, n of them.
        picks: (n, N), bool.
        first: (n,), int64, the expert that the router liked best.
        layer: which layer.
    """

    pieces: list[str]
    picks: Tensor
    first: Tensor
    layer: int


@torch.inference_mode()
def route_prompt(checkpoint: Path, prompt: str, layer: int | None = None) -> RoutedPrompt:
    """Run a checkpoint on a prompt and see which experts run in a layer, by default the middle one with experts.

    Raises:
        FactorLLMError: for a static prune, which has no experts, an empty prompt, or a layer without experts.
    """
    tokenizer = read_tokenizer(checkpoint, str(checkpoint))
    with refusing(f"the prompt {prompt[:40]!r}", "give --prompt other words"):
        tokens = torch.tensor(opened(tokenizer, whole_characters(prompt)))
    own = slice(len(opening_of(tokenizer)), None)  # what comes before each prompt says nothing of this one
    if not len(tokens[own]):
        raise FactorLLMError("the prompt is empty; give --prompt some words")
    model = load_student(checkpoint)
    routers = Routers(model)
    if not routers.modules:
        raise FactorLLMError(f"{checkpoint} is a static prune: it has no experts to show")
    having = ffn_layers(model.config)
    layer = having[len(having) // 2] if layer is None else layer
    if layer not in having:
        raise FactorLLMError(
            f"no layer {layer} with experts; those of {checkpoint} are {', '.join(map(str, having))}: give one of them"
        )
    place = having.index(layer)
    picks = expert_picks_for(model, routers, tokens)[own, place]
    first = routers.logits(soft=True)[own, place].argmax(-1)
    return RoutedPrompt([tokenizer.decode(token) for token in tokens[own]], picks, first, layer)


def specialisation(picks: dict[str, Tensor]) -> Specialisation:
    """Compare the loads of kinds of text with each other, and those of the two halves of one kind.

    Args:
        picks: for each kind of text, (n, FFNs, N) of `expert_picks_for`.
    """
    halves = {kind: [half.float().mean(0) for half in rows.chunk(2)] for kind, rows in picks.items()}
    between = [_apart(halves[one][0], halves[other][1]) for one, other in permutations(halves, 2)]
    within = [_apart(*both) for both in halves.values()]
    loads = {kind: rows.float().mean(0) for kind, rows in picks.items()}
    return Specialisation(loads, mean(between), mean(within))


def _apart(one: Tensor, other: Tensor) -> float:
    """Total variation of two loads (FFNs, N), as distributions over experts, mean over FFNs."""
    return ((one - other).abs().sum(1) / (2 * one.sum(1))).mean().item()
