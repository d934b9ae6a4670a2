"""`sample()`: text drawn from a dense model, in a file that `--text` reads, alone or together with other text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from factorllm.dense import ModelSource, open_model
from factorllm.errors import FactorLLMError
from factorllm.runs.apart import apart
from factorllm.runs.device import has_bfloat16
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.given import given, given_number, given_settings
from factorllm.runs.identity import common_identity
from factorllm.runs.output import Kind, check_output, is_done, located
from factorllm.runs.progress import meter
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import Workspace, write_text
from factorllm.text.sampling import batch_sizes, chat_opening, sample_from_model, special_tokens

_SHORTEST = 16
"""Tokens of the shortest document that is kept: what the end of a sequence cuts off is not one."""

_SOURCE = "sampled"
_LOWEST, _HIGHEST = 0.01, 100  # beyond, fp32 holds no probabilities but of one token, or of all alike


@apart()
def sample(
    model: str | Path,
    out: str | Path,
    *,
    temperature: float = 1.0,
    chat: bool = False,
    settings: Settings | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write about `settings.tokens` tokens of text that the model says by itself, a JSON line for each document.

    A killed run goes on when it is called again with the same arguments, and ends with the same bytes; a finished one
    is not repeated.

    Args:
        model: a hub id, a folder of safetensors, or a `.gguf` file.
        out: a .jsonl file; its records have the keys `source` and `text`, and the first one `job`, what made the file.
        temperature: what the logits are divided by; below 1 the text is surer of itself, and more fluent.
        chat: let the model say conversations, in its chat template, of one sequence each.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.

    Example:
        >>> sample("dense", "sampled.jsonl", settings=Settings(tokens=512, length=64)).name
        'sampled.jsonl'
    """
    model, out, console = given(model), located(out), console or Console(quiet=True)
    temperature, chat = given_number("--temperature", temperature), bool(chat)  # numpy's are no JSON
    settings = given_settings(settings, Settings())
    if out.suffix != ".jsonl":
        raise FactorLLMError(f"{out} is no .jsonl file, so --text could not read it; choose such a name")
    if not _LOWEST <= temperature <= _HIGHEST:
        raise FactorLLMError(
            f"a temperature of {temperature:g} draws nothing of use; choose one between {_LOWEST} and {_HIGHEST}"
        )
    check_output(out, SAMPLED, [model])
    source = open_model(model)
    settings = settings.resolve(source.config)
    if settings.length < _SHORTEST and not chat:
        raise _none_long_enough(settings)
    tokenizer = source.tokenizer()
    opening = chat_opening(tokenizer) if chat else None
    identity = {
        "model": source.fingerprint,
        "files beside the weights": source.surroundings,
        "temperature": temperature,
        "chat": chat,
        **common_identity(None, settings),
    }
    if not overwrite and is_done(out, SAMPLED, identity):
        console.print(f"done already, with the same arguments: {out}", markup=False)
        return out
    with explain_full_disk(out), Workspace(out, SAMPLED, identity, overwrite) as work:
        _sample_missing(source, tokenizer, opening, temperature, settings, work, console)
        batches = sorted(work.folder.glob("batch-*.jsonl"))
        documents = "".join(path.read_text(encoding="utf-8") for path in batches)
        if not documents:
            work.discard()  # another --length would be refused because of it
            raise _none_long_enough(settings)
        write_text(work.folder / out.name, _signed(documents, identity))
        work.publish(work.folder / out.name)
    return out


def _none_long_enough(settings: Settings) -> FactorLLMError:
    return FactorLLMError(
        f"in sequences of {settings.length} tokens the model says no document of at least {_SHORTEST}, and shorter "
        "ones are not kept; use a larger --length, or --chat with a chat model"
    )


def _read_sampled(path: Path) -> dict[str, Any] | None:
    """The first record of a file that `sample` wrote, which also says what made it."""
    with suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        record = json.loads(file.readline())
        if isinstance(record, dict) and record.get("source") == _SOURCE:
            return record
    return None


SAMPLED = Kind("text that factorllm sampled", False, _read_sampled)


def _signed(documents: str, identity: dict[str, Any]) -> str:
    """The documents, with what made them in the first record: a file beside them would be lost sooner."""
    first, end, others = documents.partition("\n")
    return json.dumps(json.loads(first) | {"job": identity}) + end + others if first else documents


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
                documents = [text for row in rows.tolist() for text in _documents(row, tokenizer)]
            else:
                documents = tokenizer.batch_decode([opening + row for row in rows.tolist()])
            write_text(path, "".join(json.dumps({"source": _SOURCE, "text": text}) + "\n" for text in documents))


def _documents(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts between the special tokens of a sampled sequence, without the shortest."""
    special = special_tokens(tokenizer)
    document: list[int] = []
    for token in (*tokens, None):
        if token is not None and token not in special:
            document.append(token)
            continue
        if len(document) >= _SHORTEST:
            yield str(tokenizer.decode(document))
        document = []
