"""The only doors to transformers' loaders: no Python of a model's folder is ever run; what they raise is a refusal."""

from __future__ import annotations

import copy
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights

import factorllm.dense.text_models  # noqa: F401  registers them
from factorllm.dense.wrappers import Wrapper
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.finite import is_finite
from factorllm.runs.progress import quiet_transformers

_SAFE = {"trust_remote_code": False}
"""Without it transformers asks whether to run a folder's code, and on "y" it does."""

_EAGER = ("gemma2", "granitemoe_swa")
"""Families whose attention sdpa has no way for: logits are capped, or sinks take a share."""


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    """How attention is computed. Without it a config can name a kernel on the hub, which is code too."""
    return {"attn_implementation": "eager" if config.model_type in _EAGER else "sdpa"}


_ONE_AT_A_TIME = threading.Lock()
"""While a skeleton is built, functions of torch and transformers are others, for all threads."""

_AGAIN = "it is damaged, or made by code that is not part of transformers, which is never run: use another copy"


def load_config(folder: Path, label: str | None = None) -> PreTrainedConfig:
    """The config of a transformers folder.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with quiet_transformers(), refusing(label or f"{folder}/config.json", _AGAIN):
        return AutoConfig.from_pretrained(folder, **_SAFE)


def load_tokenizer(folder: Path, label: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a transformers folder.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    with quiet_transformers(), refusing(f"the tokenizer of {label or folder}", _AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFE)
    tokenizer.init_kwargs.pop("auto_map", None)  # what is saved again must not ask its users to run code
    return tokenizer


def load_pretrained(
    folder: Path | str, config: PreTrainedConfig, wrapper: Wrapper | None, **options
) -> PreTrainedModel | tuple[PreTrainedModel, dict]:
    """The language model in a transformers folder; `options` are those of `from_pretrained`.

    Args:
        wrapper: what is round it in the folder.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    if wrapper:
        options["key_mapping"] = wrapper.key_mapping
    with quiet_transformers(), refusing(folder, _AGAIN):
        return AutoModelForCausalLM.from_pretrained(folder, config=config, **_SAFE, **_attention(config), **options)


def load_processor(folder: Path, label: str) -> ProcessorMixin:
    """What makes inputs of images and text, of a transformers folder.

    Raises:
        FactorLLMError: when transformers cannot use it, or a package that it wants is not there.
    """
    missing = [package for package in ("PIL", "torchvision", "num2words") if find_spec(package) is None]
    instead = "use another copy of it, or leave --images out"
    if missing:
        wanted = f"{' and '.join(missing)} not installed, which it may want: pip install 'factorllm[images]'"
        instead = f"{wanted}; else {instead}"
    with quiet_transformers(), refusing(f"the processor of {label}", instead):
        return AutoProcessor.from_pretrained(folder, **_SAFE)


def load_whole(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A whole vision-language model in a transformers folder; with fewer layers, where the config has fewer.

    Raises:
        FactorLLMError: when transformers cannot use it, or a tensor of it is missing.
    """
    options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    with quiet_transformers(), refusing(folder, _AGAIN):
        model, found = AutoModelForImageTextToText.from_pretrained(folder, config=config, **_SAFE, **options)
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise FactorLLMError(f"{folder} has no tensor {missing[0]}: it is damaged; fetch it again")
    return model


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with every parameter on the meta device: its structure, without memory.

    Parameters that have no values are not initialised either, which takes ten times as long as all else.
    """
    with _ONE_AT_A_TIME, no_init_weights(), init_empty_weights(include_buffers=False):
        # A copy: whoever changes the model changes its config.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **_SAFE, **_attention(config)).eval()
    model.tie_weights()
    return model


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: parameters, without a tied output head, and the buffers that are saved."""
    every = dict(module.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in module.state_dict().items() if name not in every}
    return dict(module.named_parameters()) | buffers


class Structure(NamedTuple):
    """What is known of the model of a config without its weights.

    Attributes:
        shapes: of what its checkpoint holds.
        has_finite_tables: whether what it computes from its config, as the frequencies of positions, is finite.
        architecture: what `architectures` of its config says, by which vLLM knows it.
    """

    shapes: dict[str, torch.Size]
    has_finite_tables: bool
    architecture: str


_STRUCTURES: dict[str, Structure] = {}


def structure(config: PreTrainedConfig) -> Structure:
    """That of the model of a config. It is kept: a conversion asks for those of two configs, many times."""
    key = config.to_json_string(use_diff=False)
    if key not in _STRUCTURES:
        model = skeleton(config)
        shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        tables = (table for table in model.buffers() if table.is_floating_point())
        _STRUCTURES[key] = Structure(shapes, all(map(is_finite, tables)), type(model).__name__)
    return _STRUCTURES[key]


def name_architecture(config: PreTrainedConfig) -> None:
    """Say in a config that is to be written which class it is of, by which vLLM knows it; GGUF files do not."""
    config.architectures = config.architectures or [structure(config).architecture]


def parameter_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shapes of what a checkpoint of the model of a config holds."""
    return dict(structure(config).shapes)


def read_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The generation config of a transformers folder, or the one that follows from the model's config.

    Raises:
        FactorLLMError: when transformers cannot use it.
    """
    if (folder / "generation_config.json").exists():
        return load_generation_config(folder)
    return GenerationConfig.from_model_config(config)


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
