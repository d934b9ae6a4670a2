"""Dense models, read lazily tensor by tensor: a hub id, a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorllm.errors import FactorLLMError
from factorllm.families import FAMILIES
from factorllm.sources.digest import digest_of

_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}  # keys that change with where it lies


class ModelSource(ABC):
    """A dense model on disk. Weights are read one tensor at a time, under their transformers names.

    Attributes:
        label: the model as the user named it, for messages and the model card.
        config: the transformers config.
    """

    label: str
    config: PreTrainedConfig

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The weight files, in a fixed order."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Names of all tensors in the files."""

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
        try:
            value = self._read(name)
        except KeyError:
            raise FactorLLMError(
                f"{self.label} has no tensor {name}: the checkpoint is incomplete; fetch it again"
            ) from None
        if not torch.isfinite(value).all():
            raise FactorLLMError(
                f"{self.label}: tensor {name} holds NaN or infinite values, so nothing can be fitted to it; "
                "the file is damaged or the model diverged: use another copy"
            )
        return value

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the config and of all weight files, in hexadecimal."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
        return digest_of(self.files, json.dumps(config, sort_keys=True, default=str).encode())

    def skeleton(self) -> PreTrainedModel:
        """The dense model with every parameter on the meta device: its structure, without memory."""
        with init_empty_weights(include_buffers=False):
            # A copy: whoever changes the model changes its config, and this one is the dense model's.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config), attn_implementation="sdpa", trust_remote_code=False
            ).eval()
        model.tie_weights()
        return model

    def parameter_names(self) -> list[str]:
        """Names of the parameters that must be read; a tied output head is not among them."""
        return list(dict(self.skeleton().named_parameters()))

    def output_head(self) -> torch.Tensor:
        """The matrix that makes logits, the embedding table where both are tied: (vocabulary, d)."""
        return self.tensor("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")

    def load_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole dense model, for evaluation and for sampling text."""
        model = self.skeleton()
        for name in self.parameter_names():
            module, _, leaf = name.rpartition(".")
            weight = torch.nn.Parameter(self.tensor(name).to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(module), leaf, weight)
        model.tie_weights()
        model.generation_config = self.generation_config()
        return model.to(device)

    def _check(self) -> None:
        """Refuse models that cannot be factorised exactly, before any work is done."""
        check_family(self.label, self.config.model_type)
        if getattr(self.config, "quantization_config", None):
            method = dict(self.config.quantization_config).get("quant_method", "unknown")
            raise FactorLLMError(
                f"{self.label} is quantised ({method}) and cannot be read tensor by tensor; give the unquantised "
                "checkpoint, or a GGUF file, whose quantisation can be undone"
            )
        if getattr(self.config, "hidden_act", "silu") != "silu":
            raise FactorLLMError(
                f"{self.label} uses the activation {self.config.hidden_act!r}; the engines compute SiLU experts only, "
                "so the student would be wrong in them: there is no host for it"
            )
        if getattr(self.config, "mlp_bias", False):
            raise FactorLLMError(
                f"{self.label} has biases in its FFN (mlp_bias), and no host architecture has them in its experts; "
                "only models without FFN biases can be factorised exactly"
            )
        self._check_names()

    def _check_names(self) -> None:
        have, want = set(self.names()), set(self.parameter_names())
        have = {name for name in have if not name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            have.discard("lm_head.weight")
        if missing := sorted(want - have):
            raise FactorLLMError(
                f"{self.label} lacks {len(missing)} tensors, {missing[0]} among them: the checkpoint is incomplete; "
                "fetch it again"
            )
        if extra := sorted(have - want):
            raise FactorLLMError(
                f"{self.label} holds {len(extra)} tensors that a plain {self.config.model_type} model does not have, "
                f"{extra[0]} among them; leaving them out would change the model, so it is refused"
            )


def check_family(label: str, family: object) -> None:
    """Refuse a family that is not supported, and name those that are."""
    if family in FAMILIES:
        return
    known = "; ".join(f"{key} ({known.models})" for key, known in FAMILIES.items())
    raise FactorLLMError(
        f"{label} is of the family {family!r}, which is not supported: no host architecture is known to reproduce it "
        f"exactly; supported families: {known}"
    )
