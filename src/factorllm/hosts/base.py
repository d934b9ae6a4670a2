"""What a host architecture must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import activation, family_of, ffn_layers, leading_dense, rope_of, rotary_share
from factorllm.dense.ffn import FFN
from factorllm.dense.fused import unfused
from factorllm.dense.gguf.rope import reason_against_rope
from factorllm.dense.names import place_in_layers
from factorllm.hosts.gates import Gates
from factorllm.hosts.reasons import misaligned
from factorllm.hosts.stored import WHOLE_FFN, Stored
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

    def gguf_misfit(self, config: PreTrainedConfig) -> str | None:
        """What llama.cpp has otherwise than such a model, whatever its FFNs are; None where it has all."""
        return None

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        """What the file must say beside what all architectures do, without the prefix of the architecture."""
        return {}

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """What the file holds of a tensor that is no bias.

        Args:
            name: in the checkpoint, without `.weight` and without the prefix of the layer.
        """
        return tensor

    def gguf_columns(self, name: str, config: PreTrainedConfig) -> Tensor | None:
        """Which column of a layer's matrix each one in the file is, (d,), int64; None where they are in one order.

        Args:
            name: in the file, without the prefix of the layer.
        """
        return None


class Host(GGUFForm, ABC):
    """An architecture of transformers that a student can be written in.

    Attributes:
        name: its `model_type`.
        gates: how it makes gate weights; None when it has no experts.
        ties_in_half: whether transformers compares gate weights in the model's own dtype, in which flat ones of half
            precision are all the same, so that others than the router's experts run.
        all_engines: engines that load it, whatever the dense model.
        ties_embeddings: whether its engines let the output head be the embedding table.
        gguf_ffn: the FFN's tensors by their names in GGUF files.
    """

    name: str
    gates: Gates | None = None
    ties_in_half: bool = False
    all_engines: tuple[str, ...] = ("transformers", "vllm", "sglang", "llama.cpp")
    ties_embeddings: bool = True
    gguf_ffn: ClassVar[dict[str, Stored]]

    def gate_weights(self, inputs: Tensor, router: Tensor | None, top_k: int) -> Tensor:
        """What it multiplies each expert's output with, but for what `down` is stored times: (n, N), fp32.

        Args:
            inputs: of the FFN, (n, d).
            router: (N, d); None in a static prune, which has no experts.
        """
        if router is None:
            return torch.zeros(len(inputs), 0, device=inputs.device)
        return self.gates.weights(inputs.float() @ router.T, top_k)

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
        return WHOLE_FFN if layer < leading_dense(config) else {}

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
        return self.gguf_misfit(config) or super().reason_against_gguf(config)

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
            or misaligned(config, shape)
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
