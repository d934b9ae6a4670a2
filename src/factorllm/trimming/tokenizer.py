"""The tokenizer of a trimmed model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from factorllm.dense.pretrained import load_tokenizer
from factorllm.errors import FactorLLMError
from factorllm.runs.workspace import write_json, write_text
from factorllm.trimming.renumber import renumber_tokenizer

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_WITH_OLD_IDS = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")


def read_backend(tokenizer: PreTrainedTokenizerBase, label: str) -> dict[str, Any]:
    """What `tokenizer.json` says.

    Args:
        label: the model, for messages.

    Raises:
        FactorLLMError: when the tokenizer is not a fast one, and has no such file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FactorLLMError(
            f"the tokenizer of {label} has no tokenizer.json, of which alone a part can be taken; use the model with "
            "its whole vocabulary"
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], new: Mapping[int, int], folder: Path
) -> PreTrainedTokenizerBase:
    """Write the tokenizer with the tokens that stay, and read it back.

    Args:
        backend: of `read_backend`.
        new: new ids by old ones, in their order.
    """
    tokenizer.save_pretrained(folder)
    for name in _WITH_OLD_IDS:
        (folder / name).unlink(missing_ok=True)
    write_text(folder / _FILE, json.dumps(renumber_tokenizer(backend, new), ensure_ascii=False))
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    write_json(folder / _CONFIG, _renumbered_config(config, tokenizer, new))
    return load_tokenizer(folder)


def _renumbered_config(
    config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, new: Mapping[int, int]
) -> dict[str, Any]:
    """What `tokenizer_config.json` says, without tokens that are gone: transformers would add them again."""
    gone = {str(token) for old, token in tokenizer.added_tokens_decoder.items() if old not in new}
    lists = {key: value for key, value in config.items() if isinstance(value, list)}
    left: dict[str, Any] = {key: [each for each in value if _name(each) not in gone] for key, value in lists.items()}
    if "added_tokens_decoder" in config:
        added = config["added_tokens_decoder"].items()
        left["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in added if int(old) in new}
    return config | left


def _name(token: object) -> object:
    """Of a token in a list, as a word or with how it is found in text."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def check_tokenizer(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, kept: Sequence[int], rows: Sequence[list[int]]
) -> float:
    """Cut a text anew, and compare with how it was cut.

    Args:
        kept: old ids by new ones.
        rows: sequences of old ids.

    Returns:
        How many times as many tokens the text takes.

    Raises:
        FactorLLMError: when the text is not the same, or is cut otherwise though all of its tokens stay.
    """
    stays, tokens_before, tokens_after = set(kept), 0, 0
    for row in rows:
        text = before.decode(row)
        old, new = (tokenizer(text, add_special_tokens=False).input_ids for tokenizer in (before, after))
        cut_as_before = [kept[index] for index in new] == old
        if after.decode(new) != before.decode(old) or (stays.issuperset(old) and not cut_as_before):
            raise FactorLLMError(
                f"with fewer tokens the text {text[:40]!r} would not be read as before, so nothing is written; please "
                "report this, with the model's tokenizer"
            )
        tokens_before += len(old)
        tokens_after += len(new)
    return tokens_after / max(tokens_before, 1)
