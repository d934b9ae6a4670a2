"""Dense models, read lazily tensor by tensor: a hub id, a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorllm.dense.config_checks import check_config
from factorllm.dense.names import HEAD, embeddings
from factorllm.dense.pretrained import parameter_shapes, skeleton, stored_tensors, structure
from factorllm.dense.tensor_checks import check_ffn, check_finite, check_names, check_shapes, check_tokenizer
from factorllm.dense.wrappers import Wrapper
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.digest import digest_of

_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}  # keys that change with where it lies


class ModelSource(ABC):
    """A dense model on disk. Weights are read one tensor at a time, under their transformers names.

    Attributes:
        label: the model as the user named it, for messages and the model card.
        config: the transformers config.
        wrapper: what is round it, where it is the text model of a vision-language model.
        note: what the user is told of how it is read; empty when there is nothing to tell.
    """

    note: str = ""
    wrapper: Wrapper | None = None
    label: str
    config: PreTrainedConfig

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The weight files, in a fixed order."""

    @property
    def companions(self) -> list[Path]:
        """The files beside the weights that decide what is made of them; none where the weights' file says all."""
        return []

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all tensors in the files."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            FactorLLMError: when what is stored is not the weights themselves but quantised in a way that is not undone.
        """

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template.

        Raises:
            FactorLLMError: when the model has none.
        """

    @property
    @abstractmethod
    def licence(self) -> str | None:
        """The licence that the model states, if it states one."""

    def generation_config(self) -> GenerationConfig:
        """The model's own generation config, or the one that follows from its config."""
        return GenerationConfig.from_model_config(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One weight, in the dtype it is stored in.

        Raises:
            FactorLLMError: when it is missing, cannot be read, or holds NaN or infinity.
        """
        return check_finite(self._read(name), name, self.label)

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the config and of all weight files, in hexadecimal."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
        return digest_of(self.files, json.dumps(config, sort_keys=True, default=str).encode())

    @cached_property
    def surroundings(self) -> str:
        """xxh3-128 of the files beside the weights, in hexadecimal: of the tokenizer, how it generates, and what is
        round a text model."""
        return digest_of(self.companions, " ".join(path.name for path in self.companions).encode())

    def skeleton(self) -> PreTrainedModel:
        """The dense model with every parameter on the meta device: its structure, without memory."""
        with refusing(*self._odd_config()):
            return skeleton(self.config)

    def _odd_config(self) -> tuple[str, str]:
        return f"the config of {self.label}", "mend it, or use another copy"

    def fill(self, module: nn.Module, dtype: torch.dtype, device: torch.device, prefix: str = "") -> None:
        """Load a skeleton's weights, and move its tables to the device.

        Args:
            module: the skeleton, or a part of it.
            prefix: what the names of the part's tensors begin with.
        """
        for name, empty in stored_tensors(module).items():
            place, _, leaf = name.rpartition(".")
            tensor = self.tensor(prefix + name).to(device, dtype)
            is_parameter = isinstance(empty, nn.Parameter)
            setattr(module.get_submodule(place), leaf, nn.Parameter(tensor, False) if is_parameter else tensor)
        if isinstance(module, PreTrainedModel):
            module.tie_weights()
        module.to(device)

    def parameter_names(self) -> list[str]:
        """Names of the parameters that must be read; a tied output head is not among them."""
        return list(self.parameter_shapes())

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same with their shapes."""
        with refusing(*self._odd_config()):
            return {name: tuple(shape) for name, shape in parameter_shapes(self.config).items()}

    @property
    def parameter_count(self) -> int:
        """Of the whole model, a tied head counted once."""
        return sum(map(math.prod, self.parameter_shapes().values()))

    def output_head(self) -> torch.Tensor:
        """The matrix that makes logits, the embedding table where both are tied: (vocabulary, d)."""
        return self.tensor(embeddings(self.config) if self.config.tie_word_embeddings else HEAD)

    def load_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole dense model, for evaluation and for sampling text."""
        model = self.skeleton()
        self.fill(model, dtype, device)
        model.generation_config = self.generation_config()
        return model

    def load_reference(self, config: PreTrainedConfig) -> PreTrainedModel:
        """The model as transformers makes it by itself, in fp32.

        Args:
            config: the dense one, or the same with fewer layers.
        """
        shortened = copy.copy(self)
        shortened.config = config
        return shortened.load_model(torch.float32, torch.device("cpu"))

    def _check(self) -> None:
        """Refuse models that cannot be factorised exactly, before any work is done."""
        check_config(self.label, self.config)
        with refusing(*self._odd_config()):
            shapes, has_finite_tables, _ = structure(self.config)
        if not has_finite_tables:
            raise FactorLLMError(
                f"the config of {self.label} rotates positions by no finite frequencies (rope_parameters "
                f"{self.config.rope_parameters}); mend it, or use another copy"
            )
        check_ffn(self.label, self.config, shapes)
        check_names(self.label, self.config, self.names(), shapes, [name for name in shapes if self._lacks(name)])
        check_shapes(self.label, {name: self.shape(name) for name in shapes}, shapes)

    def _lacks(self, name: str) -> bool:
        return name not in self.names()

    def _checked(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        check_tokenizer(self.label, tokenizer, self.config.vocab_size)
        return tokenizer
