"""How byte-level tokenizers cut text before merging: the names that GGUF files have for it, and what they stand for."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from factorllm.errors import FactorLLMError

# The patterns are those of the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splits(*patterns: str | PreTokenizer) -> PreTokenizer:
    """Cut by one pattern after the other, as DeepSeek's tokenizers do."""
    cuts = [Split(Regex(cut), "isolated") if isinstance(cut, str) else cut for cut in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


_HAN = "[一-龥ࠀ-一가-퟿]+"

PRE_TOKENIZERS = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _splits(_LLAMA3),
    "qwen2": _splits(_QWEN2),
    "qwen35": _splits(_QWEN35),
    "tekken": _splits(_TEKKEN),
    "seed-coder": _splits(_SEED),
    "deepseek-v3": _splits(r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3),
    "deepseek-coder": _splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, Digits(individual_digits=True)),
}
"""By `tokenizer.ggml.pre`."""

_SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "gigachat", "a.x-4.0", "modern-bert"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
}
"""Other names in GGUF files for the same cuts."""

_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")


def known_name(name: object, label: str) -> str:
    """The key of `PRE_TOKENIZERS` that a name in a GGUF file stands for.

    Args:
        label: the file, for messages.

    Raises:
        FactorLLMError: when the file has no name, or one that stands for no known way.
    """
    aliases = {other: known for known, others in _SAME.items() for other in others}
    known = aliases.get(name, name) if isinstance(name, str) else None
    if known not in PRE_TOKENIZERS:
        said = f"says that its tokenizer cuts text as {name!r}" if name else "does not say how its tokenizer cuts text"
        raise FactorLLMError(
            f"{label} {said}; known are {', '.join(sorted({*PRE_TOKENIZERS, *aliases}))}. Use the model's "
            "safetensors checkpoint, or a GGUF file that was converted anew"
        )
    return known


def takes_whole_words(name: object) -> bool:
    """Whether, under a name in a GGUF file, a word that is a token is that token, whatever the merges say."""
    return name in _WHOLE_WORDS


def name_of(tokenizer: Tokenizer) -> str | None:
    """The name that GGUF has for the tokenizer's way of cutting text, or None.

    It says too whether a word that is a token is taken whole, which is the same where merges make all tokens.
    """
    wanted = _canonical(tokenizer.pre_tokenizer)
    cuts = next((name for name, known in PRE_TOKENIZERS.items() if _canonical(known) == wanted), None)
    if cuts is None:
        return None
    whole = tokenizer.model.ignore_merges
    fitting = (name for name in (cuts, *_SAME.get(cuts, ())) if takes_whole_words(name) == whole)
    return next(fitting, None) or (cuts if _merges_make_all(tokenizer) else None)


def _merges_make_all(tokenizer: Tokenizer) -> bool:
    """Whether merges make every token that is not found in text as it is."""
    merging = Tokenizer.from_str(tokenizer.to_str()).model
    merging.ignore_merges = False
    found_before = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    words = tokenizer.get_vocab(with_added_tokens=False).keys() - found_before
    return all(len(merging.tokenize(word)) == 1 for word in words)


def _canonical(pre_tokenizer: PreTokenizer) -> str:
    """Alike for what cuts alike: patterns have the ends of lines as they are or escaped, and one of a kind or `{1}`."""

    def strip(node: object) -> object:
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items() if key != "trim_offsets"}
        if isinstance(node, str):
            return node.replace("\r", r"\r").replace("\n", r"\n").replace("{1}", "")
        return [strip(item) for item in node] if isinstance(node, list) else node

    probe = Tokenizer.from_str('{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}')
    probe.pre_tokenizer = pre_tokenizer
    return json.dumps(strip(json.loads(probe.to_str())["pre_tokenizer"]), sort_keys=True)
