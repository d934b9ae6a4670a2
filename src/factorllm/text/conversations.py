"""Conversations as a tokenizer's chat template writes them."""

from __future__ import annotations

from contextlib import suppress

from transformers import PreTrainedTokenizerBase

_SAID = "FactorLLM"

Content = str | list[dict[str, str]]


def as_text(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], opens: bool = False) -> str:
    """A conversation as the model reads it. The template is the model's own, and may raise anything.

    Args:
        turns: each with a `role` and a `content`.
        opens: whether an answer begins at the end.
    """
    # Templates of many models that take images want contents in parts, and of a plain text write nothing at all.
    parts = not _writes(tokenizer, _SAID) and _writes(tokenizer, _in_parts(_SAID))
    conversation = [turn | {"content": _in_parts(turn["content"])} if parts else turn for turn in turns]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opens))


def _writes(tokenizer: PreTrainedTokenizerBase, content: Content) -> bool:
    """Whether the template writes what a user says."""
    with suppress(Exception):
        return _SAID in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    return False


def _in_parts(content: str) -> Content:
    return [{"type": "text", "text": content}]
