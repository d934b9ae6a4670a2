"""`trim()`: a dense model with a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from factorllm.dense import ModelSource, open_model
from factorllm.dense.families import set_vocabulary
from factorllm.dense.names import HEAD, LAYERS, embeddings, layer_prefix
from factorllm.dense.pretrained import name_architecture
from factorllm.errors import FactorLLMError
from factorllm.report.template import read_template
from factorllm.runs.apart import apart
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.given import given, given_count, given_settings
from factorllm.runs.identity import common_identity
from factorllm.runs.output import TRIMMED, TRIMMED_FROM, check_output, is_done, located
from factorllm.runs.progress import meter
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import (
    Workspace,
    finish_publishing,
    shard_name,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from factorllm.text.calibration import hold_out, public_name, refuse_too_few, say_notes, text_origin
from factorllm.text.parts import open_text, sequences_of
from factorllm.trimming import COUNTED_TOKENS
from factorllm.trimming.byte_pairs import BytePairs
from factorllm.trimming.choose import check_trim, choose_tokens
from factorllm.trimming.renumber import ids_in_tokenizer, renumber_config, said_ids
from factorllm.trimming.tokenizer import check_tokenizer, read_backend, write_tokenizer

_TABLES = (HEAD, "lm_head.bias", "model.embed_tokens_per_layer.weight")
"""Tensors beside the embeddings with a row for each token."""


@dataclass(frozen=True)
class Trimmed:
    """What came of it.

    Attributes:
        out: the folder.
        vocabulary: tokens before, and now.
        parameters: before, and now.
        tokens: how many times as many tokens held-out text of the same kind takes.
    """

    out: Path
    vocabulary: tuple[int, int]
    parameters: tuple[int, int]
    tokens: float


@apart()
def trim(
    model: str | Path,
    out: str | Path,
    vocabulary: int,
    text: str | Path,
    *,
    settings: Settings | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Trimmed | None:
    """Leave out the tokens that a kind of text does not use: their rows of the embedding table and of the output head.

    What stays computes what it did: for text whose tokens all stay the logits are those of the dense model, of these
    tokens. Other text is written with more and shorter tokens. The result is a dense model like any other; convert it,
    and use it as the teacher (vocabulary trimming: arXiv 2305.15020).

    A killed run goes on when it is called again with the same arguments, and ends with the same bytes.

    Args:
        model: a hub id, a folder of safetensors, or a `.gguf` file.
        vocabulary: tokens that stay, special ones and single bytes among them.
        text: where tokens are counted, as for `factorize`.
        settings: `tokens` are counted, 10 million by default, and `held_out_tokens` are not, but cut anew to see how
            many tokens they take.

    Returns:
        None where `out` was made by the same call already.

    Raises:
        FactorLLMError: for everything that cannot be done, with the reason and what to do instead.

    Example:
        >>> trim("dense", "trimmed", 300, "my-text.txt", settings=Settings(held_out_tokens=64)).vocabulary[1]
        300
    """
    model, text, out, console = given(model), given(text), located(out), console or Console(quiet=True)
    vocabulary = given_count("--vocabulary", vocabulary)
    settings = given_settings(settings, Settings(tokens=COUNTED_TOKENS))
    finish_publishing(out)
    check_output(out, TRIMMED, [model, text])
    source = open_model(model)
    check_trim(model, source.config, source.wrapper, vocabulary)
    settings = settings.resolve(source.config)
    job = {
        "model": source.fingerprint,
        "files beside the weights": source.surroundings,
        "vocabulary": vocabulary,
        **common_identity(text, settings),
    }
    if not overwrite and is_done(out, TRIMMED, job):
        return None
    with explain_full_disk(out), Workspace(out, TRIMMED, job, overwrite) as work:
        tokenizer = source.tokenizer()
        backend = read_backend(tokenizer, source.label)
        chosen = _choose(source, tokenizer, backend, vocabulary, text, settings, console)
        folder = work.folder_at("trimmed")
        trimmed = write_tokenizer(tokenizer, backend, chosen.new, folder)
        growth = check_tokenizer(tokenizer, trimmed, chosen.kept, chosen.held_out.tolist())
        _write_weights(source, torch.tensor(chosen.kept), folder, console)
        renumber_config(source.generation_config(), chosen.new).save_pretrained(folder)
        made = {"format": 1, "base_model": {"name": public_name(source.label), "fingerprint": source.fingerprint}}
        made |= {"text": text_origin(text), "counted_tokens": chosen.counted, "tokens_of_held_out_text": growth}
        write_json(folder / TRIMMED_FROM, {**made, "kept": chosen.kept, "job": job})
        sizes = source.config.vocab_size, len(chosen.kept)
        card = read_template("trimmed.md.jinja")
        write_text(folder / "README.md", card.render(name=out.name, made=made, sizes=sizes, licence=source.licence))
        # The last: without it, no engine takes the folder for a checkpoint.
        write_json(folder / "config.json", _config(source, chosen.new).to_diff_dict())
        written = open_model(str(folder))  # which looks whether all fits together
        work.publish(folder)
    return Trimmed(out, sizes, (source.parameter_count, written.parameter_count), growth)


@dataclass(frozen=True)
class _Chosen:
    """What stays.

    Attributes:
        kept: ids of the tokens, ascending.
        counted: tokens of the text that decided it.
        held_out: of the text, (sequences, length), int64, which did not.
    """

    kept: list[int]
    counted: int
    held_out: Tensor

    @property
    def new(self) -> dict[int, int]:
        """New ids by old ones."""
        return {old: index for index, old in enumerate(self.kept)}


def _choose(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    backend: Mapping[str, Any],
    vocabulary: int,
    text: str,
    settings: Settings,
    console: Console,
) -> _Chosen:
    pairs = BytePairs(backend, source.label)
    parts = open_text(text, tokenizer, settings)
    held_out = hold_out(parts, settings)
    counted = parts.take(sequences_of(settings.tokens, settings.length))
    say_notes(parts, console)
    refuse_too_few(len(counted), 1, settings.length)
    counts = counted.flatten().bincount(minlength=source.config.vocab_size)
    kept = choose_tokens(pairs, counts, _always(source, tokenizer, backend), vocabulary)
    return _Chosen(kept, counted.numel(), held_out)


def _always(source: ModelSource, tokenizer: PreTrainedTokenizerBase, backend: Mapping[str, Any]) -> set[int]:
    """The ids of tokens that the model's files name."""
    said = {*said_ids(source.config), *said_ids(source.generation_config()), *ids_in_tokenizer(backend)}
    if max(said, default=0) >= (rows := source.config.vocab_size):
        raise FactorLLMError(f"the config of {source.label} says token {max(said)}, but it has {rows:,}; mend it first")
    # Some tokenizers have special tokens that the model has no row for.
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return said | {index for index in special if index < rows}


def _config(source: ModelSource, new: Mapping[int, int]) -> PreTrainedConfig:
    config = renumber_config(source.config, new)
    set_vocabulary(config, len(new))
    name_architecture(config)
    return config


def _write_weights(source: ModelSource, kept: Tensor, folder: Path, console: Console) -> None:
    """The shards: what stands outside the layers, and each layer. What an earlier run has written stays."""
    groups = list(_groups(source))
    with meter(console, "writing the trimmed model", len(groups)) as bar:
        for number, names in enumerate(groups, 1):
            path = folder / shard_name(number, len(groups))
            if not path.exists():
                write_shard(path, {name: _rows(source, name, source.tensor(name), kept) for name in names})
            bar.advance(1)
    write_index(folder)


def _rows(source: ModelSource, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
    """Of tables with a row for each token, the rows of those that stay; all else as it is."""
    return tensor[kept] if name in (embeddings(source.config), *_TABLES) else tensor


def _groups(source: ModelSource) -> Iterator[list[str]]:
    """Names of tensors that are written together."""
    names = source.parameter_names()
    yield [name for name in names if not name.startswith(LAYERS)]
    for index in range(source.config.num_hidden_layers):
        yield [name for name in names if name.startswith(layer_prefix(index))]
