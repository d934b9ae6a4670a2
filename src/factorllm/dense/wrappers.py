"""Vision-language models round a text model: the text model is factorised, and all else is kept as it is."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CLASSES

from factorllm.dense.names import HEAD
from factorllm.runs.output import PROCESSOR_TEMPLATE
from factorllm.runs.workspace import shard_name, write_index, write_shard

if TYPE_CHECKING:
    from factorllm.dense.safetensors import TensorFolder

WRAPPERS = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL",
    "mistral3": "Mistral Small 3, Ministral 3, Pixtral",
    "idefics3": "Idefics 3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "qwen3_5": "Qwen3.5, Qwen3.6",
    "qwen3_5_moe": "Qwen3.5, Qwen3.6, with experts",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, with experts",
}
"""Wrappers by transformers' `model_type`, with well-known models. The family is that of the text model inside."""

_WITH_EXPERTS = {
    "qwen3_5": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
}
"""Wrappers that are of another kind when the text model has experts."""

_DECODERS = ("model.language_model.", "language_model.model.", "model.text_model.")
_HEADS = (HEAD, f"language_model.{HEAD}")
_FIRST = "model-00000-of-"  # the shard of all that is round the text model
_COMPANIONS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", PROCESSOR_TEMPLATE
)  # fmt: skip


@dataclass(frozen=True)
class Wrapper:
    """What is round a text model.

    Attributes:
        config: of the whole model.
        decoder: what the names of the decoder's tensors begin with in the files, instead of `model.`.
        head: the name of the output head there.
    """

    config: PreTrainedConfig
    decoder: str
    head: str

    def text_name(self, stored: str) -> str | None:
        """The name that a tensor of the files has in the text model; None for one that is not of it."""
        if stored == self.head:
            return HEAD
        return f"model.{stored.removeprefix(self.decoder)}" if stored.startswith(self.decoder) else None

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor of the text model."""
        return self.head if name == HEAD else self.decoder + name.removeprefix("model.")

    @property
    def key_mapping(self) -> dict[str, str]:
        """The same for transformers' `from_pretrained`, as patterns."""
        return {f"^{re.escape(self.decoder)}": "model.", f"^{re.escape(self.head)}": HEAD}

    @property
    def gguf_keys(self) -> dict[str, int]:
        """What a GGUF file of the text model must say so that the file of the vision tower fits it, without the prefix
        of the architecture."""
        deep = getattr(self.config.vision_config, "deepstack_visual_indexes", ())
        return {"n_deepstack_layers": len(deep)} if deep else {}

    def config_with(self, text: PreTrainedConfig, has_experts: bool) -> PreTrainedConfig:
        """The config of the whole model round another text model."""
        said = copy.deepcopy(self.config).to_dict() | {"text_config": text.to_dict(), "dtype": text.dtype}
        kind, architecture = self.config.model_type, said["architectures"]
        if has_experts and kind in _WITH_EXPERTS:
            kind, name = _WITH_EXPERTS[kind]
            architecture = [name]
        # vLLM asks the text model's config for its class, where it has one.
        said["text_config"]["architectures"] = text.architectures or _classes_of(text)
        said |= {"architectures": architecture}
        del said["model_type"]
        said.pop("_name_or_path", None)  # where it lies on this machine
        return AutoConfig.for_model(kind, **said)


def _classes_of(text: PreTrainedConfig) -> list[str] | None:
    return [_CLASSES[text.model_type]] if text.model_type in _CLASSES else None


def unwrapped(config: PreTrainedConfig, names: Collection[str]) -> tuple[PreTrainedConfig, Wrapper | None]:
    """The text model's config, and what is round it; a config that is of no wrapper is returned as it is.

    Args:
        names: of all tensors in the files.
    """
    if config.model_type not in WRAPPERS:
        return config, None
    decoder = next((one for one in _DECODERS if f"{one}embed_tokens.weight" in names), _DECODERS[0])
    head = next((one for one in _HEADS if one in names), _HEADS[0])
    text = copy.deepcopy(config.get_text_config())
    # Wrappers do not agree on which of both configs says it.
    text.tie_word_embeddings = head not in names
    text.dtype = text.dtype or config.dtype
    if quantised := getattr(config, "quantization_config", None):
        text.quantization_config = quantised
    return text, Wrapper(config, decoder, head)


def wrap(folder: Path, wrapper: Wrapper, whole: TensorFolder) -> None:
    """Make a text checkpoint one of the whole model: rename its tensors, and add all that is round it, byte for byte.

    What was wrapped already stays as it is. The config is not written.

    Args:
        folder: of the text checkpoint.
        whole: the files of a whole model.
    """
    single = folder / "model.safetensors"
    if single.exists():
        single.rename(folder / shard_name(1, 1))
    shards = sorted(path for path in folder.glob("model-*.safetensors") if not path.name.startswith(_FIRST))
    for path in shards:
        tensors = load_file(path)
        if any(wrapper.text_name(name) is None for name in tensors):
            write_shard(path, {wrapper.stored_name(name): tensor for name, tensor in tensors.items()})
    rest = {name: whole.read_stored(name) for name in whole.others}
    write_shard(folder / f"{_FIRST}{shards[-1].name[-len('00001.safetensors') :]}", rest)
    write_index(folder)
    for name in _COMPANIONS:
        if (whole.folder / name).exists():
            shutil.copy(whole.folder / name, folder)
