"""The dense model's own architecture, narrower: the host of a static prune."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from factorllm.dense.families import (
    activation,
    biased_projections,
    family_of,
    ffn_width,
    rope_of,
    set_ffn_width,
    sliding_window,
)
from factorllm.dense.gguf.rope import rope_keys
from factorllm.dense.pretrained import name_architecture
from factorllm.hosts.base import GGUFForm, GGUFKeys, Host, StudentFFN
from factorllm.hosts.cohere2_moe import Cohere2MoeHost
from factorllm.hosts.gemma4 import Gemma4Host
from factorllm.hosts.glm4_moe import Glm4MoeHost
from factorllm.hosts.granitemoe import GraniteMoeHost
from factorllm.hosts.granitemoehybrid import GraniteMoeHybridHost, has_mamba
from factorllm.hosts.hunyuan_v1_moe import HunYuanMoeHost
from factorllm.hosts.lfm2_moe import Lfm2MoeHost
from factorllm.hosts.nemotron_h import NemotronHHost
from factorllm.hosts.qwen3_5_moe import Qwen35MoeHost
from factorllm.hosts.qwen3_vl_moe import Qwen3VLMoeHost
from factorllm.hosts.reasons import scaled_in_windows, uneven_heads, unwindowed
from factorllm.hosts.stored import Stored
from factorllm.recipe import Shape


class DenseHost(Host):
    name = "dense"

    def reason_against(self, config: PreTrainedConfig, shape: Shape) -> str | None:
        return "it has no experts" if shape.experts else None

    def config(self, dense: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
        config = copy.deepcopy(dense)
        set_ffn_width(config, shape.kept_width)
        name_architecture(config)
        return config

    def ffn_tensors(self, student: StudentFFN, config: PreTrainedConfig) -> dict[str, Tensor]:
        return family_of(config).ffn.tensors(student.ffn)

    def ffn_parts(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return (family_of(config).ffn.slot,)

    def matrices(self, config: PreTrainedConfig) -> int:
        return 2 if family_of(config).ffn.gate is None else 3

    def _unfit_engines(self, config: PreTrainedConfig) -> set[str]:
        # It knows other names of Nemotron-H's kinds of layers than transformers writes.
        return {"sglang"} if config.model_type == "nemotron_h" else set()

    def reason_against_gguf(self, config: PreTrainedConfig) -> str | None:
        if config.model_type not in _WRITTEN:
            return f"GGUF files of {config.model_type} are not supported yet"
        return _WRITTEN[config.model_type].misfit(config, self.gguf(config)) or super().reason_against_gguf(config)

    def gguf(self, config: PreTrainedConfig) -> str:
        if config.model_type == "granitemoehybrid" and not has_mamba(config):
            return "granite"
        return family_of(config).gguf or ""

    def gguf_form(self, config: PreTrainedConfig) -> GGUFForm:
        return _WRITTEN[config.model_type].form

    def gguf_ffn_of(self, config: PreTrainedConfig) -> dict[str, Stored]:
        layout = family_of(config).ffn
        gate, up, down = (f"{layout.slot}.{name}.weight" for name in (layout.gate, layout.up, layout.down))
        if layout.gate is None or _WRITTEN[config.model_type].keeps_fused:
            inputs = {"ffn_up.weight": Stored(up)}
        else:
            first, second = (0, 1) if layout.is_fused else (None, None)
            inputs = {"ffn_gate.weight": Stored(gate, first), "ffn_up.weight": Stored(up, second)}
        return inputs | {"ffn_down.weight": Stored(down)}

    def gguf_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {"feed_forward_length": ffn_width(config)}


_PLAIN = GGUFForm()


@dataclass(frozen=True)
class _Written:
    """How llama.cpp has a dense family.

    Attributes:
        form: what is beside the FFNs; where a host with experts has it too, that host.
        keeps_fused: whether gate and up are one matrix there.
        activation: of its FFNs, by the name in transformers.
        output_bias: whether its attention may have a bias on what it gives.
        own_head: whether its output head may be another matrix than the embeddings.
        misfits: other reasons than those of `form` why a model of the family is not what llama.cpp computes, or None.
    """

    form: GGUFForm = _PLAIN
    keeps_fused: bool = False
    activation: str = "silu"
    output_bias: bool = False
    own_head: bool = True
    misfits: tuple[Callable[[PreTrainedConfig], str | None], ...] = ()

    def misfit(self, config: PreTrainedConfig, architecture: str) -> str | None:
        """The first reason against the file, or None."""
        if activation(config) != self.activation:
            return f"llama.cpp's {architecture} computes {self.activation}, not {activation(config)}"
        if "o_proj" in biased_projections(config) and not self.output_bias:
            return f"the attention output of llama.cpp's {architecture} has no bias"
        if not config.tie_word_embeddings and not self.own_head:
            return f"the output head of llama.cpp's {architecture} is its embedding table"
        reasons = (reason(config) for reason in (*self.misfits, self.form.gguf_misfit))
        return next((f"in llama.cpp's {architecture}, {reason}" for reason in reasons if reason), None)


class _FusedQueries(GGUFForm):
    gguf_names: ClassVar = {"self_attn.qkv_proj": "attn_qkv"}


class _CommandR(Cohere2MoeHost):
    gguf_has_windows = False


class _NormsAfter(GGUFForm):
    """With norms on what attention and FFN give, and none before."""

    gguf_names: ClassVar = {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }


class _OLMo3(_NormsAfter):
    gguf_has_windows = True


class _GLM4(GGUFForm):
    gguf_names: ClassVar = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}


class _ZeroCentred(GGUFForm):
    """With norms that multiply with 1 + their weight, where llama.cpp's multiply with the weight."""

    def gguf_content(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        return tensor.float() + 1 if name.endswith("norm") else tensor


class _Gemma(_ZeroCentred, _NormsAfter):
    gguf_names: ClassVar = {**_NormsAfter.gguf_names, "pre_feedforward_layernorm": "ffn_norm"}
    gguf_has_windows = True

    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        keys = ("attn_logit_softcapping", "final_logit_softcapping")
        return {key: float(value) for key in keys if (value := getattr(config, key, None))}


class _Nemotron(_ZeroCentred):
    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        return {"attention.layer_norm_epsilon": config.norm_eps}


class _Ministral3(GGUFForm):
    def gguf_other_keys(self, config: PreTrainedConfig) -> GGUFKeys:
        rope = config.rope_parameters
        if not rope.get("llama_4_scaling_beta"):
            return {}
        return {
            "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }


def _other_no_rope_layers(config: PreTrainedConfig) -> str | None:
    fixed = [int((index + 1) % 4 != 0) for index in range(config.num_hidden_layers)]
    return None if config.no_rope_layers == fixed else "every fourth layer has no positions, not others"


def _normalised_queries(config: PreTrainedConfig) -> str | None:
    normalised = getattr(config, "use_qk_norm", False) or getattr(config, "qk_layernorm", False)
    return "queries and keys are not normalised as this model does" if normalised else None


def _windows(config: PreTrainedConfig) -> str | None:
    return "layers with a window are not supported yet" if sliding_window(config) else None


def _unwindowed(config: PreTrainedConfig) -> str | None:
    return unwindowed(config.layer_types)


def _other_theta_in_windows(config: PreTrainedConfig) -> str | None:
    thetas = {rope_of(config, kind)["rope_theta"] for kind in ("full_attention", "sliding_attention")}
    return None if len(thetas) == 1 else "all layers rotate by one theta"


def _queries_scaled_otherwise(largest: int) -> Callable[[PreTrainedConfig], str | None]:
    """Of Gemma, whose largest model llama.cpp knows by its layers."""

    def reason(config: PreTrainedConfig) -> str | None:
        of_largest = config.num_hidden_layers == largest
        fixed = config.hidden_size // config.num_attention_heads if of_largest else config.head_dim
        said = config.query_pre_attn_scalar
        return None if said == fixed else f"queries are scaled by {fixed}, not by query_pre_attn_scalar = {said}"

    return reason


def _capped_attention(config: PreTrainedConfig) -> str | None:
    return "attention is not capped" if getattr(config, "attn_logit_softcapping", None) else None


def _reads_both_ways(config: PreTrainedConfig) -> str | None:
    return "no token sees those after it" if config.use_bidirectional_attention else None


def _scaled_by_yarn(config: PreTrainedConfig) -> str | None:
    """Of architectures in which YaRN's scaling is of layers without a window only, but for what a file says of it."""
    said = "rope.scaling.attn_factor" in rope_keys(rope_of(config))
    return "the attention factor of YaRN scales layers with a window too" if said else None


def _of_the_largest(config: PreTrainedConfig) -> str | None:
    """Of EXAONE 4, whose largest model llama.cpp knows by its layers."""
    largest = 64
    return f"models of {largest} layers have windows" if config.num_hidden_layers == largest else None


def _uncapped(config: PreTrainedConfig) -> str | None:
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    return None if all(caps) else "attention and logits are always capped"


_GELU, _RELU2 = "gelu_pytorch_tanh", "relu2"

_WRITTEN = {
    "llama": _Written(output_bias=True),
    "mistral": _Written(output_bias=True),
    "qwen2": _Written(misfits=(uneven_heads,)),
    "qwen3": _Written(),
    "qwen3_5_text": _Written(Qwen35MoeHost()),
    "qwen3_vl_text": _Written(Qwen3VLMoeHost()),
    "granite": _Written(GraniteMoeHost(), output_bias=True),
    "granitemoehybrid": _Written(GraniteMoeHybridHost(), output_bias=True),
    "phi3": _Written(_FusedQueries(), keeps_fused=True, misfits=(uneven_heads,)),
    "smollm3": _Written(misfits=(_other_no_rope_layers,)),
    "lfm2": _Written(Lfm2MoeHost()),
    "gemma4_text": _Written(Gemma4Host(), activation=_GELU),
    "ministral3": _Written(_Ministral3(), output_bias=True),
    "seed_oss": _Written(Glm4MoeHost()),
    "olmo2": _Written(_NormsAfter(), misfits=(uneven_heads,)),
    "olmo3": _Written(_OLMo3(), misfits=(uneven_heads, _unwindowed, scaled_in_windows, _other_theta_in_windows)),
    "cohere": _Written(_CommandR(), own_head=False, misfits=(uneven_heads, _normalised_queries)),
    "cohere2": _Written(Cohere2MoeHost(), own_head=False, misfits=(uneven_heads,)),
    "hunyuan_v1_dense": _Written(HunYuanMoeHost()),
    "ernie4_5": _Written(output_bias=True),
    "glm": _Written(keeps_fused=True, misfits=(uneven_heads,)),
    "glm4": _Written(_GLM4(), keeps_fused=True),
    "gemma2": _Written(
        _Gemma(), activation=_GELU, own_head=False, misfits=(_queries_scaled_otherwise(46), _uncapped, _unwindowed)
    ),
    "gemma3_text": _Written(
        _Gemma(),
        activation=_GELU,
        misfits=(
            _queries_scaled_otherwise(62),
            scaled_in_windows,
            _capped_attention,
            _reads_both_ways,
            _scaled_by_yarn,
            _unwindowed,
        ),
    ),
    "exaone4": _Written(_NormsAfter(), misfits=(uneven_heads, _windows, _of_the_largest)),
    "stablelm": _Written(misfits=(_normalised_queries,)),
    "arcee": _Written(activation=_RELU2),
    "nemotron": _Written(_Nemotron(), activation=_RELU2, output_bias=True, misfits=(uneven_heads,)),
    "nemotron_h": _Written(NemotronHHost(), activation=_RELU2),
}
"""Families by `model_type`."""
