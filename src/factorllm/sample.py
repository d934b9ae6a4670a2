"""`sample()`: text drawn from a dense model, in a file that `--text` reads, alone or together with other text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from factorllm.checkpoint import Workspace, explain_full_disk, refuse_existing, write_text
from factorllm.errors import FactorLLMError
from factorllm.job import versions
from factorllm.progress import meter
from factorllm.settings import Settings, has_bfloat16
from factorllm.sources import ModelSource, open_model
from factorllm.sources.sampling import batch_sizes, chat_opening, sample_from_model

_SHORTEST = 16
"""Tokens of the shortest document that is kept: what the end of a sequence cuts off is not one."""


def sample(
    model: str,
    out: str | Path,
    *,
    temperature: float = 1.0,
    chat: bool = False,
    settings: Settings | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write about `settings.tokens` tokens of text that the model says by itself, a JSON line for each document.

    A killed run goes on when it is called again with the same arguments, and ends with the same bytes.

    Args:
        model: a hub id, a folder of safetensors, or a `.gguf` file.
        out: a .jsonl file; its records have the keys `source` and `text`.
        temperature: what the logits are divided by; below 1 the text is surer of itself, and more fluent.
        chat: let the model say conversations, in its chat template, of one sequence each.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.
    """
    out, console = Path(out), console or Console(quiet=True)
    if out.suffix != ".jsonl":
        raise FactorLLMError(f"{out} is no .jsonl file, so --text could not read it; choose such a name")
    if not 0 < temperature < math.inf:
        raise FactorLLMError(f"a temperature of {temperature} draws nothing; use 1, or less for more fluent text")
    if not overwrite:
        refuse_existing(out)
    source = open_model(model)
    settings = (settings or Settings()).resolve(source.config)
    tokenizer = source.tokenizer()
    opening = chat_opening(tokenizer) if chat else None
    identity = {
        "model": source.fingerprint,
        "temperature": temperature,
        "chat": chat,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    with explain_full_disk(out):
        work = Workspace(out, identity, overwrite)
        try:
            _sample_missing(source, tokenizer, opening, temperature, settings, work, console)
            batches = sorted(work.folder.glob("batch-*.jsonl"))
            write_text(work.folder / out.name, "".join(path.read_text(encoding="utf-8") for path in batches))
            work.publish(work.folder / out.name)
        finally:
            work.close()
    return out


def _sample_missing(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    opening: list[int] | None,
    temperature: float,
    settings: Settings,
    work: Workspace,
    console: Console,
) -> None:
    """Each batch has its own seed and its own file, so that a killed run goes on after the last one."""
    sequences = -(-settings.tokens // settings.length)
    sizes = batch_sizes(sequences)
    paths = [work.folder / f"batch-{number:05d}.jsonl" for number in range(len(sizes))]
    done = sum(size for size, path in zip(sizes, paths, strict=True) if path.exists())
    device = settings.torch_device
    model = source.load_model(torch.bfloat16 if has_bfloat16(device) else torch.float32, device)
    with meter(console, "sampling", sequences * settings.length, done * settings.length) as bar:
        for number, (size, path) in enumerate(zip(sizes, paths, strict=True)):
            if path.exists():
                continue
            seed = settings.seed * 1_000_003 + number
            rows = sample_from_model(model, tokenizer, size, settings.length, seed, bar.advance, temperature, opening)
            if opening is None:
                documents = (text for row in rows.tolist() for text in _documents(row, tokenizer))
            else:
                documents = tokenizer.batch_decode([opening + row for row in rows.tolist()])
            write_text(path, "".join(json.dumps({"source": "sampled", "text": text}) + "\n" for text in documents))


def _documents(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts between the special tokens of a sampled sequence, without the shortest."""
    special = set(tokenizer.all_special_ids)
    document: list[int] = []
    for token in [*tokens, None]:
        if token is not None and token not in special:
            document.append(token)
            continue
        if len(document) >= _SHORTEST:
            yield tokenizer.decode(document)
        document = []
