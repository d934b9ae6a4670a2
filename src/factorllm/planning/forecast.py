"""The speed of every shape, from a micro-benchmark of a few of them in the engine itself.

A layer's time is fitted as `a + b s + r k + c [routed]`: attention and norms, the neurons that always run, those that
are routed, and what routing costs beside. Four stand-ins (`stand_in.py`) of a small vocabulary settle the four numbers,
and one with the whole of it what the head costs. Of a large model they have a few layers only. All are timed in turns,
each file type by itself.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.optimize import nnls
from transformers import PreTrainedConfig

from factorllm.dense.families import ffn_layers, ffn_width, head_dim, key_value_heads
from factorllm.engines import check_installed
from factorllm.errors import FactorLLMError
from factorllm.measure.cost import dense_shape
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.subjects import Subject
from factorllm.measure.speed.timing import Measure, measure_speed
from factorllm.planning import TYPES
from factorllm.planning.stand_in import StandIn, with_layers, with_tokens
from factorllm.recipe import Recipe, Shape, parse_recipe
from factorllm.runs.disk import IN_TMPDIR, require_space
from factorllm.runs.progress import meter

RECIPES = ("S4A2E8", "S2A2E8", "S0A4E8N3", "S1A1E8", "S6A0E8", "S4A0E8", "S2A0E8")
"""Shapes that are worth a thought: a quarter to three quarters of the FFN off, routed and pruned."""

_TIMED = ("S2A2E8", "S1A1E8", "S2A0E8")
_TRIES = 3  # of timing, before other programs are said to disturb it
_HEAD = "head"
_LAYER_BYTES = 384 << 20
"""Weights of layers that a stand-in has at least, if the model has so many. They do not fit in a processor's cache, and
what is timed of all layers is off by half of what is concluded from a third of them."""

_FEW_TOKENS = 1024  # a vocabulary whose head takes no time
_KV_BYTES = 2  # a number of the cache of keys and values is float16
_CONTEXT = 4096  # tokens of a conversation, for what memory is needed


@dataclass(frozen=True)
class Expected:
    """What one shape in one file type is expected to do.

    Attributes:
        name: the recipe; `dense`; or `trimmed`, the dense model with fewer tokens.
        recipe: None for the dense model, trimmed or not.
        sparsity: share of the FFN's neurons that do not run for a token.
        decode, prefill: tokens/s at batch 1.
        decode_ratio, prefill_ratio: over the dense model in the same type.
        head_share: of the time of a token that is decoded, the output head's.
        file_bytes: of the GGUF file, without its tokenizer.
        memory_bytes: that, and the cache of a conversation of 4096 tokens.
    """

    name: str
    recipe: Recipe | None
    file_type: str
    sparsity: float
    decode: float
    prefill: float
    decode_ratio: float
    prefill_ratio: float
    head_share: float
    file_bytes: int
    memory_bytes: int

    @property
    def kind(self) -> str:
        if self.recipe is None:
            return self.name
        return "static prune" if self.recipe.is_prune else "student"


@dataclass(frozen=True)
class _Step:
    """Seconds of a token: what the head takes, and the coefficients of a layer."""

    head: float
    layer: np.ndarray

    def with_head(self, share: float) -> _Step:
        """Of a model with a share of the tokens, whose head is as much smaller."""
        return replace(self, head=share * self.head)

    def seconds(self, shape: Shape, layers: int) -> float:
        return self.head + layers * float(_terms(shape) @ self.layer)


def forecast(
    config: PreTrainedConfig,
    types: tuple[str, ...] = TYPES,
    vocabulary: int | None = None,
    console: Console | None = None,
) -> list[Expected]:
    """The speed and size of each shape of `RECIPES` and of the dense model, in llama.cpp on this machine.

    Args:
        config: of the dense model; nothing else of it is read.
        types: GGUF file types.
        vocabulary: tokens that stay of it; None for all. The dense model has all of them in any case.

    Raises:
        FactorLLMError: when llama.cpp is not installed or has no such architecture, no shape is possible, or
            some layers have no FFN; when other programs disturb the timing.
    """
    console = console or Console(quiet=True)
    if len(ffn_layers(config)) < config.num_hidden_layers:
        raise FactorLLMError(
            f"its speed in llama.cpp cannot be foretold, for not each layer of {config.model_type} has an FFN; "
            "factorize it, and measure with factorllm bench"
        )
    shapes = _shapes(config)
    dense = StandIn.of(config, dense_shape(config))
    if reason := dense.host.reason_against_gguf(config):
        raise FactorLLMError(
            f"its speed in llama.cpp cannot be foretold: {reason}; factorize it, and measure with factorllm bench"
        )
    check_installed("llamacpp")
    fewer = config if vocabulary is None else with_tokens(config, vocabulary)
    rest = shapes[1:] if vocabulary is None else shapes  # the trimmed model is one beside the dense one
    models = [(config, shapes[0]), *((fewer, shape) for shape in rest)]
    timed = _timed_shapes(config, shapes)
    found = []
    for file_type in types:
        steps = _fit(config, timed, [shape for _, shape in shapes], file_type, console)
        found += [_expected(config, one, *shape, file_type, steps) for one, shape in models]
    return found


def _shapes(config: PreTrainedConfig) -> list[tuple[Recipe | None, Shape]]:
    """The dense model, and each recipe that the FFN's width and a host allow."""
    width, found = ffn_width(config), [(None, dense_shape(config))]
    for name in RECIPES:
        recipe = parse_recipe(name)
        try:
            shape = recipe.shape(width)
            StandIn.of(with_layers(config, 1), shape)
        except FactorLLMError:
            continue
        found.append((recipe, shape))
    return found


def _brief_plan(config: PreTrainedConfig) -> Plan:
    """A prompt as long as `bench` has before decoding, and steps after it in turns: several short ones where layers are
    large. To read a prompt takes most of the time, so it is read once and has four turns of steps."""
    large = config.hidden_size * ffn_width(config) > 1 << 24
    tokens, steps, rounds, turns = (32, 8, 4, 1) if large else (Plan().context, 16, 1, 4)
    threads = (len(os.sched_getaffinity(0)),)
    batches = turns * (1,)
    brief = Plan(rounds=rounds, prompts=(tokens,), context=tokens, steps=steps, batches=batches, threads=threads)
    return brief.within(config.max_position_embeddings)


def _fit(
    config: PreTrainedConfig, timed: dict[str, Shape], shapes: list[Shape], file_type: str, console: Console
) -> dict[str, _Step]:
    """A token's seconds of prefill and of decoding, by which each shape takes some.

    What another program disturbed for a moment is timed again.

    Raises:
        FactorLLMError: where some shape would take no time, however often it is timed.
    """
    for _ in range(_TRIES):
        steps = _timed_steps(config, timed, file_type, console)
        if all(step.seconds(shape, config.num_hidden_layers) > 0 for step in steps.values() for shape in shapes):
            return steps
    raise FactorLLMError(
        "the times of llama.cpp contradict each other, for some shape would take none: stop other programs "
        "that use this machine, and repeat the command"
    )


def _timed_steps(
    config: PreTrainedConfig, shapes: dict[str, Shape], file_type: str, console: Console
) -> dict[str, _Step]:
    """Time the stand-ins of one type, and settle a token's seconds of prefill and of decoding."""
    depth, plan = _depth(config), _brief_plan(config)
    body = with_layers(with_tokens(config, min(_FEW_TOKENS, config.vocab_size)), depth)
    with tempfile.TemporaryDirectory(prefix="factorllm-plan-") as work:
        models = {name: StandIn.of(body, shape) for name, shape in shapes.items()}
        models[_HEAD] = StandIn.of(with_layers(config, depth // 2), shapes["dense"])
        subjects = [_subject(name, model, file_type, Path(work)) for name, model in models.items()]
        with meter(console, f"timing stand-ins of {depth} layers, {file_type}", 1) as bar:
            measures = {m.subject.name: m for m in measure_speed(subjects, "llamacpp", plan, Console(quiet=True))}
            bar.advance()
    return {what: _settle(what, measures, shapes, depth) for what in plan.names()}


def _settle(what: str, measures: dict[str, Measure], shapes: dict[str, Shape], depth: int) -> _Step:
    seconds = {name: 1 / measure.speed(what) for name, measure in measures.items()}
    head = max(seconds.pop(_HEAD) - seconds["dense"] * (depth // 2) / depth, 0.0)  # noise may be larger
    terms = np.stack([_terms(shapes[name]) for name in seconds])
    target = np.array(list(seconds.values())) / depth
    scale = terms.max(0)  # of a prune alone nothing is routed, and the column is zero
    scale[scale == 0] = 1
    return _Step(head, nnls(terms / scale, target)[0] / scale)


def _terms(shape: Shape) -> np.ndarray:
    """What a layer's time is made of: (4,)."""
    routed = shape.top_k * shape.expert_width if shape.experts else 0
    return np.array([1.0, shape.shared_width, routed, float(shape.experts > 0)])


def _timed_shapes(config: PreTrainedConfig, shapes: list[tuple[Recipe | None, Shape]]) -> dict[str, Shape]:
    """Those that are timed, the dense model first."""
    named = {recipe.name if recipe else "dense": shape for recipe, shape in shapes}
    found = {name: shape for name, shape in named.items() if name in ("dense", *_TIMED)}
    if len(found) == 1:
        raise FactorLLMError(
            f"its FFN of {ffn_width(config)} neurons does not divide by 8, so none of the usual shapes is possible; "
            "factorllm prune keeps any share of it"
        )
    return found


def _depth(config: PreTrainedConfig) -> int:
    """Layers of a stand-in; at least two, of which half can be left out."""
    one = StandIn.of(with_layers(config, 1), dense_shape(config)).layout("q8_0")
    layer = sum(planned.size for name, planned in one.items() if name.startswith("blk."))
    return min(max(-(-_LAYER_BYTES // layer), 2), config.num_hidden_layers)


def _subject(name: str, model: StandIn, file_type: str, work: Path) -> Subject:
    path, size = work / f"{name}.gguf", model.file_size(file_type)
    require_space(path, size, IN_TMPDIR)
    model.write(path, file_type)
    return Subject(name, name, path, model.cost(), size, model.config.max_position_embeddings)


def _expected(
    dense: PreTrainedConfig,
    config: PreTrainedConfig,
    recipe: Recipe | None,
    shape: Shape,
    file_type: str,
    steps: dict[str, _Step],
) -> Expected:
    """Of one shape.

    Args:
        config: the dense model's, or the same with fewer tokens: what is given the shape.
        steps: of the dense model.
    """
    layers, share = config.num_hidden_layers, config.vocab_size / dense.vocab_size
    prefilling, decoding = (step.with_head(share) for step in steps.values())
    prefill, decode = (step.seconds(shape, layers) for step in (prefilling, decoding))
    dense_prefill, dense_decode = (step.seconds(dense_shape(dense), layers) for step in steps.values())
    size = StandIn.of(config, shape).file_size(file_type)
    cache = 2 * layers * key_value_heads(config) * head_dim(config) * _KV_BYTES * _CONTEXT
    return Expected(
        name=recipe.name if recipe else "dense" if config is dense else "trimmed",
        recipe=recipe,
        file_type=file_type,
        sparsity=shape.sparsity,
        decode=1 / decode,
        prefill=1 / prefill,
        decode_ratio=dense_decode / decode,
        prefill_ratio=dense_prefill / prefill,
        head_share=decoding.head / decode,
        file_bytes=size,
        memory_bytes=size + cache,
    )
