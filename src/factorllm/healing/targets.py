"""What the teacher says of the text, computed once and kept on disk: its likely next tokens, and each layer's prior."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from factorllm.convert.partition import Partition
from factorllm.convert.route import expert_scores, prior_distribution
from factorllm.dense.families import family_of
from factorllm.dense.ffn import FFN
from factorllm.dense.layer import ffn_of
from factorllm.dense.modules import head_logits, layers_with_ffn
from factorllm.healing.losses import matched_streams, top_log_probs
from factorllm.runs.workspace import write_shard

SHARD = 32
"""Sequences in a file."""

_HEAD_ROWS = 128


@dataclass(frozen=True)
class Asked:
    """What is wanted of the teacher.

    Attributes:
        bfloat16: whether matrix products before the output head are computed in bfloat16.
        vocabulary: most likely tokens that are kept for each position.
        temperature: of their probabilities.
        partitions: for each FFN that was cut, the student's experts; empty for a student without routers.
        top_k, prior: of the student's recipe.
        streams: layers whose residual stream is kept.
    """

    vocabulary: int
    temperature: float
    partitions: list[Partition]
    top_k: int
    prior: str
    bfloat16: bool
    streams: int


class Targets(Dataset):
    """Sequences with the teacher's targets, read from disk one at a time.

    An item has `input_ids` (length,) int64, `top_ids` (length, K) int32, `top_log_probs` (length, K) fp16; if the
    student has routers, `priors` (length, FFNs, N) fp16; if they are matched, `streams` (length, layers, d) bf16.
    """

    def __init__(self, tokens: Tensor, folder: Path, part: str):
        self.tokens, self._folder, self._part = tokens, folder, part

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, row = divmod(index, SHARD)
        with safe_open(self.shard(number), framework="pt") as file:
            item = {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118  no mapping
        return {"input_ids": self.tokens[index], **item}

    def size_of(self, number: int) -> int:
        """Sequences in a shard."""
        return min(SHARD, len(self) - number * SHARD)

    def shard(self, number: int) -> Path:
        return self._folder / f"{self._part}-{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        return [number for number in range(-(-len(self) // SHARD)) if not self.shard(number).exists()]

    def compute(
        self, number: int, teacher: PreTrainedModel, asked: Asked, batch: int, advance: Callable[[int], None]
    ) -> None:
        """Write one shard.

        Args:
            batch: sequences that the teacher runs at once.
            advance: called with the number of sequences after each batch.
        """
        batches = []
        for tokens in self.tokens[number * SHARD : (number + 1) * SHARD].split(batch):
            batches.append(ask(teacher, tokens, asked))
            advance(len(tokens))
        write_shard(self.shard(number), {name: torch.cat([b[name] for b in batches]) for name in batches[0]})


@torch.inference_mode()
def ask(teacher: PreTrainedModel, tokens: Tensor, asked: Asked) -> dict[str, Tensor]:
    """The teacher's targets for `tokens` (sequences, length), as in an item of `Targets`."""
    autocast = torch.autocast(teacher.device.type, torch.bfloat16, enabled=asked.bfloat16)
    with _recorded_priors(teacher, asked) as priors, autocast:
        output = teacher.get_decoder()(
            tokens.to(teacher.device), use_cache=False, output_hidden_states=asked.streams > 0
        )
    # In fp32: logits are large, and bf16 rounds them by several percent. A few at a time: memory is fetched anew for
    # all of them at once, which takes longer than their product.
    states = output.last_hidden_state.float().flatten(0, 1).split(_HEAD_ROWS)
    tops = [top_log_probs(head_logits(teacher, rows), asked.vocabulary, asked.temperature) for rows in states]
    ids, log_probs = (torch.cat(part).view(*tokens.shape, -1) for part in zip(*tops, strict=True))
    found = {"top_ids": ids.int().cpu(), "top_log_probs": log_probs.half().cpu()}
    if priors:
        found["priors"] = torch.stack(priors, dim=1).view(*tokens.shape, len(priors), -1).half().cpu()
    if asked.streams:
        found["streams"] = matched_streams(output.hidden_states, asked.streams).bfloat16().cpu()
    return found


@contextmanager
def _recorded_priors(teacher: PreTrainedModel, asked: Asked) -> Iterator[list[Tensor]]:
    """The prior (tokens, N) of each FFN, filled while the teacher runs."""
    priors, hooks = [], []
    layout = family_of(teacher.config).ffn
    layers = layers_with_ffn(teacher)[-len(asked.partitions) :] if asked.partitions else []
    ffns = [ffn_of(layer, teacher.config) for layer in layers]
    for layer, ffn, split in zip(layers, ffns, asked.partitions, strict=True):

        def record(_, inputs: tuple[Tensor], ffn: FFN = ffn, split: Partition = split) -> None:
            scores = expert_scores(ffn, inputs[0].flatten(0, 1), split, asked.top_k, asked.prior)
            priors.append(prior_distribution(scores, asked.top_k, asked.prior))

        hooks.append(layer.get_submodule(f"{layout.slot}.{layout.down}").register_forward_pre_hook(record))
    try:
        yield priors
    finally:
        for hook in hooks:
            hook.remove()
