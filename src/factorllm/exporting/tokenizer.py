"""The tokenizer's keys of a GGUF file: copied from the dense model's GGUF, or built from the Hugging Face tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from factorllm.dense.gguf.file import open_gguf
from factorllm.dense.gguf.pretokenizers import PRE_TOKENIZERS, name_of
from factorllm.dense.gguf.tokenizer import ENDS
from factorllm.dense.opening import opening_of
from factorllm.errors import FactorLLMError

_OTHERWISE = 0.01  # share of a model's tokens that its GGUF file may write otherwise
_PHI3 = re.compile("phi-?3", re.IGNORECASE)
_COPY = "give the GGUF of the dense model with --tokenizer, whose tokenizer is then copied"
_NOT_STRIPPING = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_SPACES = {"first": "before a text alone", "always": "there too"}
"""Where SentencePiece's marks of spaces are put, by `prepend_scheme`."""


def name_in_file(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name that a file gives a model.

    By it alone llama.cpp knows a tokenizer as Phi-3's, whose special tokens take the spaces and line ends after them.
    It does the same for any other model of such a name, or does not load it.
    """
    if _strips_as_phi3(tokenizer):
        return name if _PHI3.search(name) else f"{name} (Phi-3)"
    return _PHI3.sub("phi 3", name)


def _strips_as_phi3(tokenizer: PreTrainedTokenizerBase) -> bool:
    others = [token for token in tokenizer.added_tokens_decoder.values() if str(token) not in _NOT_STRIPPING]
    return bool(others) and tokenizer.get_vocab().keys() >= _NOT_STRIPPING and all(token.rstrip for token in others)


def copy_tokenizer(writer: gguf.GGUFWriter, path: Path, own: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Copy the tokenizer of another GGUF file.

    Args:
        own: the model's.
        vocabulary: rows of the embedding table.

    Raises:
        FactorLLMError: when it has none, or one with another number of tokens or other tokens.
    """
    fields = {key: field for key, field in open_gguf(path).fields.items() if key.startswith("tokenizer.")}
    field = fields.get("tokenizer.ggml.tokens")
    tokens = [] if field is None else field.contents()
    if len(tokens) != vocabulary:
        have = "no tokenizer" if field is None else f"a tokenizer of {len(tokens)} tokens"
        raise FactorLLMError(f"{path} has {have}, the model has {vocabulary}; give the GGUF of its own dense model")
    _refuse_other_tokens(path, tokens, own)
    for key, field in fields.items():
        of_items = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=of_items)


def _refuse_other_tokens(path: Path, tokens: list[str], own: PreTrainedTokenizerBase) -> None:
    """Refuse as many tokens of another model. A few of its own may be written otherwise, as special ones are."""
    known = _by_id(own)
    others = [
        index
        for index, token in enumerate(tokens)
        if index in known and token.replace("▁", " ") != known[index].replace("▁", " ")
    ]
    if len(others) > _OTHERWISE * len(tokens):
        raise FactorLLMError(
            f"{path} has other tokens than the model, {len(others)} of {len(tokens)}: {others[0]} is "
            f"{tokens[others[0]]!r} there and {known[others[0]]!r} here; give the GGUF of its own dense model"
        )


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]
) -> None:
    """Write the keys that stand for a Hugging Face tokenizer.

    Args:
        vocabulary: rows of the embedding table; tokens that the tokenizer lacks are filled in as unused.
        ends: ids of the tokens that end an answer.

    Raises:
        FactorLLMError: when GGUF has no name for how the tokenizer changes or cuts text.
    """
    model = check_tokenizer(tokenizer)["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(list(_scores(tokenizer, merges, vocabulary)))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_name(tokenizer))
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    tokens, types = zip(*_tokens(tokenizer, vocabulary, bool(model.get("byte_fallback"))), strict=True)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)
    _add_ends(writer, tokenizer, [index for index in ends if 0 <= index < vocabulary])


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Refuse a Hugging Face tokenizer that no GGUF file can stand for.

    Returns:
        What `tokenizer.json` says.

    Raises:
        FactorLLMError: saying why.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend else {"model": {}}
    model = content["model"]
    if model.get("type") != "BPE":
        raise FactorLLMError(f"the tokenizer is not a fast BPE tokenizer, the only kind that is written; {_COPY}")
    _refuse_other_steps(content, bool(model.get("byte_fallback")))
    if not model.get("byte_fallback"):
        _pre_name(tokenizer)
    return content


def cut_otherwise(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is said of a tokenizer that is written: what GGUF files cannot say of it, and llama.cpp cuts otherwise."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    said = [
        "llama.cpp puts a space before a text and after each special token, as SentencePiece does; transformers, with "
        f"this tokenizer, {_SPACES[place]}, and none where one is: tokens there may differ"
        for step in _steps(content.get("pre_tokenizer"))
        if (place := step.get("prepend_scheme")) in _SPACES
    ]
    prepends = any(step["type"] == "Prepend" for step in _steps(content.get("normalizer")))
    heeded = [
        token["content"]
        for token in content["added_tokens"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (prepends and token["normalized"])
    ]
    if heeded and not _strips_as_phi3(tokenizer):
        more = f" and {len(heeded) - 1} more" if len(heeded) > 1 else ""
        said.append(
            f"llama.cpp finds {heeded[0]!r}{more} in a text wherever it stands, and takes no spaces with it; "
            "transformers heeds lstrip, rstrip, single_word and normalized: tokens beside it may differ"
        )
    return said


def _refuse_other_steps(content: dict[str, Any], byte_fallback: bool) -> None:
    """Refuse what a tokenizer does to text that llama.cpp would not do.

    Args:
        content: what `tokenizer.json` says.
        byte_fallback: whether it marks spaces, as SentencePiece does; such tokenizers cut text nowhere else.
    """
    steps = _steps(content.get("normalizer"))
    if byte_fallback:
        steps += _steps(content.get("pre_tokenizer"))
    if other := next((step for step in steps if not _is_done(step, byte_fallback)), None):
        raise FactorLLMError(
            f"the tokenizer changes or cuts text by {other['type']}, which GGUF files cannot say; {_COPY}"
        )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of `tokenizer.json`, one after the other."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [step for each in part.get("normalizers") or part.get("pretokenizers") or () for step in _steps(each)]


def _is_done(step: dict[str, Any], byte_fallback: bool) -> bool:
    """Whether llama.cpp does it too, of text that is composed already (NFC)."""
    match step:
        case {"type": "NFC"}:
            return not byte_fallback
        case {"type": "Prepend", "prepend": "▁"} | {"type": "Metaspace", "replacement": "▁"}:
            return byte_fallback
        case {"type": "Replace" | "Split", "pattern": {"String": " "}}:
            return byte_fallback
        case _:
            return False


def _pre_name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = name_of(tokenizer.backend_tokenizer)
    if name is None:
        raise FactorLLMError(
            f"the tokenizer cuts text in a way that is none of those written ({', '.join(PRE_TOKENIZERS)}), or takes "
            f"words whole that llama.cpp would merge, or merges words that it would take whole (ignore_merges); {_COPY}"
        )
    return name


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, byte_fallback: bool
) -> Iterator[tuple[str, TokenType]]:
    added, known = tokenizer.added_tokens_decoder, _by_id(tokenizer)
    for index in range(vocabulary):
        if index not in known:
            yield f"[PAD{index}]", TokenType.UNUSED
        elif byte_fallback and index == tokenizer.unk_token_id:
            yield known[index], TokenType.UNKNOWN
        elif index in added:
            yield known[index], TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        elif byte_fallback and known[index].startswith("<0x"):
            yield known[index], TokenType.BYTE
        else:
            yield known[index], TokenType.NORMAL


def _scores(tokenizer: PreTrainedTokenizerBase, merges: list[str], vocabulary: int) -> Iterator[float]:
    """SentencePiece merges the pair of the highest score first, so scores are the negative ranks of the merges."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    known = _by_id(tokenizer)
    for index in range(vocabulary):
        yield -float(rank.get(known.get(index, ""), len(merges)))


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁")


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "pad", "unk"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(opening_of(tokenizer)))
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    _add_templates(writer, tokenizer.chat_template)


def _add_ends(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    """What ends an answer beside the end token: files have a place for two, and llama.cpp knows others by their names.

    GLM's answers end where the user's turn begins; without it llama.cpp would go on and write that turn itself.
    """
    known = {index for token, index in tokenizer.get_vocab().items() if token in ENDS} | {tokenizer.eos_token_id}
    others = (index for index in ends if index not in known)
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(index)


def _add_templates(writer: gguf.GGUFWriter, templates: str | dict[str, str] | None) -> None:
    """Chat templates, the one that is used unless another is asked for under its own key, as llama.cpp reads them.

    gguf's own way puts the names of the others in an order that differs from run to run.
    """
    keys, named = gguf.Keys.Tokenizer, {"default": templates} if isinstance(templates, str) else dict(templates or {})
    if default := named.pop("default", None):
        writer.add_chat_template(default)
    for name, template in sorted(named.items()):
        writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), template)
    if named:
        writer.add_array(keys.CHAT_TEMPLATES, sorted(named))
