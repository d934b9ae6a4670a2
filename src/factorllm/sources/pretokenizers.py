"""How byte-level tokenizers cut text before merging: the names that GGUF files have for it, and what they stand for."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# The patterns are those of the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}
"""By `tokenizer.ggml.pre`."""


def name_of(tokenizer: Tokenizer) -> str | None:
    """The name that GGUF has for the tokenizer's way of cutting text, or None."""
    wanted = _canonical(tokenizer.pre_tokenizer)
    return next((name for name, known in PRE_TOKENIZERS.items() if _canonical(known) == wanted), None)


def _canonical(pre_tokenizer: PreTokenizer) -> str:
    def strip(node: object) -> object:
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items() if key != "trim_offsets"}
        return [strip(item) for item in node] if isinstance(node, list) else node

    probe = Tokenizer.from_str('{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}')
    probe.pre_tokenizer = pre_tokenizer
    return json.dumps(strip(json.loads(probe.to_str())["pre_tokenizer"]), sort_keys=True)
