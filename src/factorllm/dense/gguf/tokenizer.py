"""The tokenizer of a GGUF file, built from its keys as llama.cpp reads them.

transformers builds one too, but with tokens that the file has not, and with GPT-2's way of cutting text for most names.
"""

from __future__ import annotations

from collections.abc import Callable

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from factorllm.dense.gguf.pretokenizers import PRE_TOKENIZERS, known_name, takes_whole_words
from factorllm.errors import FactorLLMError, refusing

_SPACE = "▁"
_USUAL = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of SentencePiece's special tokens where a file does not say them."""

Field = Callable[[str], object]
"""What a key below `tokenizer.` says; None when it is not there."""


ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>",
    "_<EOT>", "<end_of_utterance>",
)  # fmt: skip
"""Tokens at which llama.cpp ends an answer whatever a file says, by their names."""


def end_tokens(field: Field) -> list[int]:
    """Ids of all tokens at which llama.cpp ends an answer to a chat, the end token first."""
    tokens = field("ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    eos = field("ggml.eos_token_id")
    usual = _USUAL["eos"] if field("ggml.model") == "llama" else None
    said = [usual if eos is None else eos, *(field(f"ggml.{kind}_token_id") for kind in ("eot", "eom"))]
    named = [index for index, token in enumerate(tokens) if token in ENDS]
    found = [index for index in (*said, *named) if isinstance(index, int) and 0 <= index < len(tokens)]
    return list(dict.fromkeys(found))


def build_tokenizer(field: Field, label: str, context: int) -> PreTrainedTokenizerBase:
    """The tokenizer that a file describes.

    Args:
        context: tokens that the model was trained on.
        label: the file, for messages.

    Raises:
        FactorLLMError: when it is damaged, or of a kind that is not built here.
    """
    kind = field("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise FactorLLMError(
            f"{label} has a tokenizer of the kind {kind!r}, which is not read (gpt2, llama are); use the model's "
            "safetensors checkpoint"
        )
    with refusing(f"the tokenizer of {label}", "it is damaged: fetch the file again"):
        backend = _byte_level(field, label) if kind == "gpt2" else _sentencepiece(field)
        _add_tokens(backend, field)
        special = _special(field)
        backend.post_processor = _bos_and_eos(backend, field, special)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=_chat_templates(field),
            model_max_length=context,
            clean_up_tokenization_spaces=False,
            **special,
        )


def _byte_level(field: Field, label: str) -> Tokenizer:
    cuts = PRE_TOKENIZERS[known_name(field("ggml.pre"), label)]
    merges = [_pair(merge) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab=_vocabulary(field), merges=merges))
    backend.model.ignore_merges = takes_whole_words(field("ggml.pre"))
    backend.pre_tokenizer = cuts
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(field: Field) -> Tokenizer:
    vocabulary = _vocabulary(field)
    unknown = field("ggml.unknown_token_id") or 0
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of_scores(vocabulary, field("ggml.scores")),
            unk_token=field("ggml.tokens")[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading = [] if field("ggml.add_space_prefix") is False else [normalizers.Prepend(_SPACE)]
    backend.normalizer = normalizers.Sequence([*leading, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if leading else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _vocabulary(field: Field) -> dict[str, int]:
    return {token: index for index, token in enumerate(field("ggml.tokens"))}


def _pair(merge: str) -> tuple[str, str]:
    """The first character of a token may be a space in files of old."""
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _merges_of_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest, so all pairs that make a token, by its score."""
    found = []
    for token, index in vocabulary.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        found += [(-scores[index], index, *pair) for pair in sorted(pairs)]
    return [(a, b) for *_, a, b in sorted(found)]


def _add_tokens(backend: Tokenizer, field: Field) -> None:
    """Tokens that are found in text as they are, before it is cut."""
    kinds = field("ggml.token_type") or []
    named = list(zip(field("ggml.tokens"), kinds, strict=False))
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in named if kind == TokenType.CONTROL]
    )
    backend.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in named if kind == TokenType.USER_DEFINED]
    )


def _special(field: Field) -> dict[str, str]:
    """The special tokens by transformers' names; llama.cpp's own where the file does not say them."""
    usual = _USUAL if field("ggml.model") == "llama" else {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: field(f"ggml.{kind}_token_id") for kind, name in names.items()}
    ids |= {names[kind]: index for kind, index in usual.items() if ids[names[kind]] is None}
    return {name: field("ggml.tokens")[index] for name, index in ids.items() if index is not None}


def _chat_templates(field: Field) -> object:
    """The chat template, or all by their names where there are others beside it."""
    default = field("chat_template")
    named = {name: field(f"chat_template.{name}") for name in field("chat_templates") or []}
    others = {name: template for name, template in named.items() if template is not None}
    return {"default": default} | others if default and others else default


def _bos_and_eos(backend: Tokenizer, field: Field, special: dict[str, str]) -> processors.PostProcessor:
    by_itself = field("ggml.model") == "llama" or takes_whole_words(field("ggml.pre"))
    says = {"bos_token": field("ggml.add_bos_token"), "eos_token": field("ggml.add_eos_token")}
    says["bos_token"] = by_itself if says["bos_token"] is None else says["bos_token"]
    added = {name: special[name] for name, wanted in says.items() if wanted and name in special}
    around = [added.get("bos_token"), "$A", added.get("eos_token")]
    return processors.TemplateProcessing(
        single=[part for part in around if part],
        pair=[part for part in (*around, *(part.replace("$A", "$B") for part in around if part)) if part],
        special_tokens=[(token, backend.token_to_id(token)) for token in added.values()],
    )
