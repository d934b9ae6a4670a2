"""The only doors to transformers' loaders: no Python of a model's folder is ever run; what they raise is a refusal."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorllm.errors import refusing
from factorllm.runs.progress import quiet_transformers

_SAFE = {"trust_remote_code": False}
"""Without it transformers asks whether to run a folder's code, and on "y" it does."""

_ATTENTION = {"attn_implementation": "sdpa"}
"""Else a config can name a kernel on the hub, which is code too."""

_AGAIN = "it is damaged, or made by code that is not part of transformers, which is never run: use another copy"


def load_config(folder: Path, label: str | None = None, **options) -> PreTrainedConfig:
    """The config of a transformers folder, or of a GGUF file in it (`gguf_file=`).

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with quiet_transformers(), refusing(label or f"{folder}/config.json", _AGAIN):
        return AutoConfig.from_pretrained(folder, **_SAFE, **options)


def load_tokenizer(folder: Path, label: str | None = None, **options) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder, or of a GGUF file in it (`gguf_file=`).

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with quiet_transformers(), refusing(f"the tokenizer of {label or folder}", _AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFE, **options)
    tokenizer.init_kwargs.pop("auto_map", None)  # what is saved again must not ask its users to run code
    return tokenizer


def load_pretrained(folder: Path | str, **options) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """The model in a transformers folder; `options` are those of `from_pretrained`.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with quiet_transformers(), refusing(folder, _AGAIN):
        return AutoModelForCausalLM.from_pretrained(folder, **_SAFE, **_ATTENTION, **options)


def load_generation_config(folder: Path) -> GenerationConfig:
    """The generation config of a transformers folder that has one.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with (
        quiet_transformers(),
        refusing(f"{folder}/generation_config.json", "mend it, or remove it to generate as the config says"),
    ):
        return GenerationConfig.from_pretrained(folder)
