"""What is known of a dense model before its weights are there: its config."""

from __future__ import annotations

from transformers import PreTrainedConfig

from factorllm.dense import is_hub_id, local_path, open_model
from factorllm.dense.config_checks import check_config, check_family
from factorllm.dense.hub import download_config
from factorllm.dense.names import HEAD
from factorllm.dense.safetensors import read_config
from factorllm.dense.wrappers import Wrapper, unwrapped


def read_dense_config(model: str) -> PreTrainedConfig:
    """The config of a dense model, as `read_dense_header` reads it."""
    return read_dense_header(model)[0]


def read_dense_header(model: str) -> tuple[PreTrainedConfig, Wrapper | None]:
    """The config of a dense model, and what is round it where it is the text model of a vision-language model.

    Where its weights are there, their names and shapes are checked against the config.

    Args:
        model: a folder, which may hold nothing but `config.json`; a `.gguf` file; or a hub id, of which only
            `config.json` is fetched.

    Raises:
        FactorLLMError: when there is no such model, or its family is not supported.
    """
    path = local_path(model)
    on_hub = is_hub_id(model, path)
    if not on_hub and (not path.is_dir() or any(path.glob("*.safetensors"))):
        source = open_model(model)
        return source.config, source.wrapper
    whole = read_config(download_config(model) if on_hub else path, model)
    config, wrapper = unwrapped(whole, () if whole.tie_word_embeddings else (HEAD,))
    check_family(model, config)
    check_config(model, config)
    return config, wrapper
