"""New ids for tokens, wherever a model's files say an id."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from transformers import GenerationConfig, PreTrainedConfig

from factorllm.errors import FactorLLMError

Config = TypeVar("Config", PreTrainedConfig, GenerationConfig)

_OF_TOKENS = re.compile(r"(^|_)token_(ids?|index)$")
_LISTS = (
    "bad_words_ids", "begin_suppress_tokens", "force_words_ids", "forced_decoder_ids", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip
_POST_PROCESSORS = ("TemplateProcessing", "ByteLevel", "Sequence")


def said_ids(config: Config) -> Iterator[int]:
    """The ids of tokens that a config says.

    Raises:
        FactorLLMError: when it has lists of tokens that are not written anew here.
    """
    content = config.to_dict()
    if found := next((key for key in _LISTS if content.get(key)), None):
        raise FactorLLMError(
            f"the generation config lists tokens by their ids ({found}), which would be others; remove it first"
        )
    for key, value in content.items():
        if _OF_TOKENS.search(key):
            yield from filter(_is_token, value if isinstance(value, list) else [value])


def ids_in_tokenizer(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """The ids of tokens that `tokenizer.json` says beside its words: those that are put around a text, and the one that
    stands for what is unknown.

    Raises:
        FactorLLMError: when ids stand in a part of it that is not known here.
    """
    yield from _ids_of(tokenizer.get("post_processor"))
    unknown = tokenizer["model"].get("unk_token")
    if unknown in tokenizer["model"]["vocab"]:
        yield tokenizer["model"]["vocab"][unknown]


def renumber_config(config: Config, new: Mapping[int, int]) -> Config:
    """A copy of a config, with new ids.

    Args:
        new: new ids by old ones.
    """
    copied = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if _OF_TOKENS.search(key):
            setattr(copied, key, _renumbered(value, new))
    return copied


def renumber_tokenizer(tokenizer: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """What `tokenizer.json` says of the tokens that stay.

    Args:
        new: new ids by old ones, in their order.
    """
    model = tokenizer["model"]
    vocabulary = {token: new[index] for token, index in model["vocab"].items() if index in new}
    merges = [[a, b] for a, b in model["merges"] if {a, b, a + b} <= vocabulary.keys()]
    return tokenizer | {
        "model": model | {"vocab": vocabulary, "merges": merges},
        "added_tokens": [token | {"id": new[token["id"]]} for token in tokenizer["added_tokens"] if token["id"] in new],
        "post_processor": _renumbered_processor(tokenizer.get("post_processor"), new),
        "truncation": None,
        "padding": None,
    }


def _renumbered_processor(processor: dict[str, Any] | None, new: Mapping[int, int]) -> dict[str, Any] | None:
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return processor | {"processors": [_renumbered_processor(each, new) for each in processor["processors"]]}
    if processor["type"] == "ByteLevel":
        return processor
    special = {
        name: token | {"ids": [new[index] for index in token["ids"]]}
        for name, token in processor["special_tokens"].items()
    }
    return processor | {"special_tokens": special}


def _ids_of(processor: dict[str, Any] | None) -> Iterator[int]:
    if processor is None:
        return
    if processor["type"] not in _POST_PROCESSORS:
        raise FactorLLMError(
            f"the tokenizer puts tokens around text by {processor['type']}, which is not written anew; use the model "
            "with its whole vocabulary"
        )
    for each in processor.get("processors", ()):
        yield from _ids_of(each)
    for token in processor.get("special_tokens", {}).values():
        yield from token["ids"]


def _is_token(value: object) -> bool:
    """Whether it is an id; what is negative stands for no token."""
    return isinstance(value, int) and value >= 0


def _renumbered(value: object, new: Mapping[int, int]) -> object:
    if isinstance(value, list):
        return [_renumbered(each, new) for each in value]
    return new[value] if _is_token(value) else value
