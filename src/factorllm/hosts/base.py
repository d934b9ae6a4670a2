"""What a host architecture must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import (
    activation,
    family_of,
    ffn_layers,
    head_dim,
    leading_dense,
    normalises_heads,
    rope_of,
    rope_type,
    rotary_share,
    sliding_window,
)
from factorllm.dense.ffn import FFN
from factorllm.dense.fused import unfused
from factorllm.dense.gguf.rope import reason_against_rope
from factorllm.dense.names import place_in_layers
from factorllm.hosts.gates import Gates
from factorllm.recipe import Shape


@dataclass(frozen=True)
class StudentFFN:
    """A factorised FFN: neurons in the order shared part, expert 0, expert 1, ...

    Attributes:
        ffn: gate and up (kept, d), down (d, kept).
        router: (N, d), or None in a static prune.
        shape: widths.
    """

    ffn: FFN
    router: Tensor | None
    shape: Shape

    def shared(self) -> FFN:
        """The shared expert."""
        return self.ffn.part(self.shape.shared_columns)

    def experts(self, gates: Gates) -> list[FFN]:
        """The routed experts, `down` scaled so that nearly equal gate weights of a host come to 1."""
        scale = gates.scale(self.shape)
        parts = [self.ffn.part(columns) for columns in self.shape.expert_columns()]
        return [replace(part, down=part.down * scale) for part in parts]


GGUFKeys = dict[str, Any]
"""Keys of a GGUF file below its architecture: numbers, texts, and lists with an entry for each layer."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a GGUF file is in the checkpoint.

    Attributes:
        name: the tensor's name on disk, without the prefix of the layer; `{}` stands for each expert, to be stacked.
        half: None for all of it, 0 or 1 for the first or second half of its rows.
        transposed: whether rows and columns of each expert have changed places there.
    """

    name: str
    half: int | None = None
    transposed: bool = False


class GGUFForm:
    """What a GGUF file holds and says of a model beside its FFNs.

    Attributes:
        gguf_ffn_norm: the name there of the norm before the FFN.
        gguf_names: the names there of what a layer holds beside, by those in the checkpoint, where they differ from
            Llama's; both without `.weight`, but for tensors whose names in the checkpoint have none.
        gguf_has_windows: whether llama.cpp reads the windows of its layers.
        gguf_final_norm: the norm after the last layer, by its names in the checkpoint and there.
    """

    gguf_ffn_norm: str = "ffn_norm"
    gguf_names: ClassVar[dict[str, str]] = {}
    gguf_has_windows: bool = False
    gguf_final_norm: tuple[str, str] = ("norm", "output_norm")

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        """What the file must say beside what all architectures do, without the prefix of the architecture."""
        return {}

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """What the file holds of a tensor that is no bias.

        Args:
            name: in the checkpoint, without `.weight` and without the prefix of the layer.
        """
        return tensor


class Host(GGUFForm, ABC):
    """An architecture of transformers that a student can be written in.

    Attributes:
        name: its `model_type`.
        gates: how it makes gate weights; None when it has no experts.
        all_engines: engines that load it, whatever the dense model.
        ties_embeddings: whether its engines let the output head be the embedding table.
        gguf_ffn: the FFN's tensors by their names in GGUF files.
    """

    name: str
    gates: Gates | None = None
    all_engines: tuple[str, ...] = ("transformers", "vllm", "sglang", "llama.cpp")
    ties_embeddings: bool = True
    gguf_ffn: ClassVar[dict[str, Stored]]

    def engines(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Engines that load the student without custom code.

        Args:
            config: of the dense model or of the student.
        """
        unfit = {"llama.cpp"} if self.reason_against_gguf(config) else set()
        return tuple(engine for engine in self.all_engines if engine not in unfit | self._unfit_engines(config))

    def _unfit_engines(self, config: PreTrainedConfig) -> set[str]:
        return set()

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        """Why llama.cpp would compute something else than the checkpoint says, or None."""
        return reason_against_rope(rope_of(config), self.gguf(config))

    @abstractmethod
    def gguf(self, config: PreTrainedConfig) -> str:
        """The architecture in GGUF files."""

    def gguf_form(self, config: PreTrainedConfig) -> GGUFForm:
        """What is so of a GGUF file beside the FFNs."""
        return self

    def gguf_ffn_at(self, layer: int, config: PreTrainedConfig) -> dict[str, Stored]:
        """The tensors of a layer's FFN by their names in GGUF files."""
        if layer in ffn_layers(config):
            return self.gguf_ffn_of(config)
        return _WHOLE_FFN if layer < leading_dense(config) else {}

    def gguf_ffn_of(self, config: PreTrainedConfig) -> dict[str, Stored]:
        """Those of `gguf_ffn` that a student has: some hosts have a shared expert or none."""
        if self.shape(config).shared_width:
            return self.gguf_ffn
        return {name: stored for name, stored in self.gguf_ffn.items() if "shexp" not in name}

    @abstractmethod
    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        """What a GGUF file must say of the FFN, without the prefix of the architecture.

        Args:
            config: the student's.
        """

    def shape(self, config: PreTrainedConfig) -> Shape:
        """The widths of a checkpoint, from its config."""
        keys = self.gguf_keys(config)
        width = keys.get("expert_feed_forward_length") or keys["feed_forward_length"]
        experts, top_k = keys.get("expert_count", 0), keys.get("expert_used_count", 0)
        shared = keys.get("expert_shared_feed_forward_length", keys.get("expert_shared_count", 0) * width)
        if not experts:
            shared = width
        leading = keys.get("leading_dense_block_count", 0)
        return Shape(shared + experts * width, shared, experts, width, top_k, leading)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """The parts of a decoder layer in transformers that are the FFN, in a layer that has one."""
        return ("mlp",)

    def is_of_ffn(self, name: str, config: PreTrainedConfig) -> bool:
        """Whether a tensor, by its name in transformers, is an FFN's."""
        place = place_in_layers(name)
        return place is not None and place[0] in ffn_layers(config) and place[1] in self.ffn_parts(config)

    def matrices(self, config: PreTrainedConfig) -> int:
        """In which a neuron has a row or a column."""
        return 3

    def holds(self, config: PreTrainedConfig) -> bool:
        """Whether it holds models of a dense family, in some shapes at least."""
        return True

    @abstractmethod
    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        """Why this host cannot hold the student exactly, or None when it can."""

    @abstractmethod
    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        """The student's config."""

    @abstractmethod
    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        """The FFN's tensors by their names on disk, without the prefix of the layer.

        Args:
            config: of the dense model or of the student.
        """

    def other_tensors(self, dense: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a layer holds beside its FFN, without the prefix of the layer.

        Args:
            tensors: the same of the dense model, by its names.
        """
        return tensors


class MoeHost(Host):
    """A host with routed experts.

    Attributes:
        families: dense families that it holds, by `model_type`.
        shared: whether it has a shared expert: `no`, `always` or `optional`.
        shares_whole_experts: whether the shared expert must be as wide as some routed ones.
        activation: of its experts, by the name in transformers.
        rotates_parts: whether it can rotate a part of each head by its position.
        leads_dense: whether its first layers can have an FFN that is whole.
    """

    families: tuple[str, ...]
    shared: str
    shares_whole_experts: bool = False
    activation: str = "silu"
    rotates_parts: bool = False
    leads_dense: bool = False

    gates: Gates
    gguf_architecture: str | None

    def gguf(self, config: PreTrainedConfig) -> str:
        return self.gguf_architecture or ""

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        if self.gguf_architecture is None:
            return f"GGUF files of {self.name} are not supported yet"
        return super().reason_against_gguf(config)

    def holds(self, config: PreTrainedConfig) -> bool:
        return config.model_type in self.families

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        if shape.experts == 0:
            return "a static prune has no experts"
        return (
            self._reason_against_family(config)
            or self._reason_against_others(config)
            or self._reason_against_shape(shape)
            or self._reason_against_leading(config, shape)
            or _misaligned(config, shape)
        )

    def _reason_against_others(self, config: PreTrainedConfig) -> str | None:
        if not self.holds(config):
            return f"it holds {', '.join(self.families)} only"
        if activation(config) != self.activation:
            return f"its experts compute {self.activation}, not {activation(config)}"
        return None if rotary_share(config) == 1 or self.rotates_parts else "it rotates heads whole"

    def other_tensors(self, dense: PreTrainedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return unfused(dense, tensors)

    def _reason_against_family(self, config: PreTrainedConfig) -> str | None:
        """What this host has not, of what the dense model has."""
        return None

    def _reason_against_leading(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        if shape.leading_dense >= config.num_hidden_layers:
            return f"of {config.num_hidden_layers} layers at least one must have experts"
        if shape.leading_dense and not self.leads_dense:
            return "all its layers have experts"
        fused = family_of(config).ffn.is_fused
        return "in whole FFNs it holds gate and up apart" if shape.leading_dense and fused else None

    def _reason_against_shape(self, shape: Shape) -> str | None:
        if shape.shared_width and self.shared == "no":
            return "it has no shared expert"
        if self.shares_whole_experts and shape.shared_width % shape.expert_width:
            return "its shared part must be a multiple of an expert"
        return "it always has a shared expert" if not shape.shared_width and self.shared == "always" else None


_WHOLE_FFN = {f"ffn_{name}.weight": Stored(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")}

_OWN = {"model_type", "architectures", "transformers_version", "dtype"}

ALIGNED = 8
"""What widths must be multiples of: rows of 16 bytes in bf16."""

_COMMON_KEYS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
]  # fmt: skip


def common_config(dense: PreTrainedConfig) -> dict:
    """The part of the dense config that every host spells as Llama does."""
    return {key: getattr(dense, key) for key in _COMMON_KEYS}


def carried(dense: PreTrainedConfig, kind: type[PreTrainedConfig]) -> dict:
    """The part of the dense config that a config of another kind, of the same makers, spells alike."""
    known = kind().to_dict().keys() - _OWN
    return {key: value for key, value in dense.to_dict().items() if key in known}


def windowed(config: PreTrainedConfig) -> str | None:
    """The reason against hosts whose attention sees everything before."""
    return "it has no sliding window" if sliding_window(config) else None


def scaled_rope(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that read no parameters of Phi's long RoPE."""
    return "it has no long RoPE" if rope_type(config) == "longrope" else None


def scaled_in_windows(config: PreTrainedConfig) -> str | None:
    """The reason against architectures of llama.cpp that scale positions in layers without a window only."""
    kind = rope_of(config, "sliding_attention").get("rope_type", "default")
    return None if kind == "default" else f"layers with a window have no {kind} RoPE scaling"


def uneven_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that take the head size from the hidden size."""
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        return "it needs head_dim = hidden_size / heads"
    return None


def normalised_heads(config: PreTrainedConfig) -> str | None:
    """The reason against hosts that leave queries and keys as they are."""
    return "it does not normalise queries and keys" if normalises_heads(config) else None


def stacked(experts: list[FFN]) -> tuple[Tensor, Tensor]:
    """All experts as two tensors: gate over up (N, 2 width, d), and down (N, d, width)."""
    return torch.stack([torch.cat([e.gate, e.up]) for e in experts]), torch.stack([e.down for e in experts])


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def one_expert(ffn: FFN, prefix: str, names: tuple[str, str, str] = _PROJECTIONS) -> dict[str, Tensor]:
    """An expert on disk, as most hosts name its matrices, or by other names of gate, up and down."""
    name = dict(zip(("gate", "up", "down"), names, strict=True))
    return {f"{prefix}.{name[which]}.weight": matrix for which, matrix in ffn.matrices.items()}


def per_expert(experts: list[FFN], prefix: str, names: tuple[str, str, str] = _PROJECTIONS) -> dict[str, Tensor]:
    """One expert after the other, as most hosts have them on disk."""
    found: dict[str, Tensor] = {}
    for i, expert in enumerate(experts):
        found |= one_expert(expert, f"{prefix}.{i}", names)
    return found


def gguf_experts(gate: Stored, up: Stored, down: Stored) -> dict[str, Stored]:
    return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up, "ffn_down_exps.weight": down}


def gguf_shared(gate: Stored, up: Stored, down: Stored) -> dict[str, Stored]:
    return {"ffn_gate_shexp.weight": gate, "ffn_up_shexp.weight": up, "ffn_down_shexp.weight": down}


def projections(prefix: str) -> tuple[Stored, Stored, Stored]:
    """Gate, up and down by the names of most hosts."""
    return tuple(Stored(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))


def _misaligned(config: PreTrainedConfig, shape: Shape) -> str | None:
    """Why the experts' matrices cannot be multiplied by transformers' default back end, or None when they can."""
    for what, width in (("experts", shape.expert_width), ("a hidden size", config.hidden_size)):
        if width % ALIGNED:
            return (
                f"the student would have {what} of {width} neurons, but transformers' grouped_mm needs multiples of "
                f"{ALIGNED}; cut the FFN into fewer parts"
            )
    return None
