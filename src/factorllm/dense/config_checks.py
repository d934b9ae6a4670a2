"""What a config can say that changes the model and that is not applied here: each is a refusal that names it."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from factorllm.dense.families import (
    FAMILIES,
    OTHERS,
    activation,
    family_of,
    ffn_layers,
    has_experts,
    normalises_heads,
    ropes,
    rotary_share,
    rotates,
    sliding_window,
)
from factorllm.dense.wrappers import WRAPPERS
from factorllm.errors import FactorLLMError

_OF_OTHERS: dict[str, tuple] = {
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "layer_types": ("full_attention",),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0, 1),
    "no_rope_layers": (1,),  # 0 leaves a layer without positions
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (0,),
    "transformers_weights": (),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
"""Keys of other families, with the values beside None that change nothing. transformers' class of a family that lacks a
key ignores it without a word, and so would the student."""

_OF_EACH_LAYER = {"layer_types", "no_rope_layers"}

_OUTPUTS = (
    ("return_dict", False, "which hides the logits' name"),
    ("output_attentions", True, "for which transformers' sdpa, which is used here, has no way"),
)
"""What a config can ask a model to give back that it cannot give here, and why."""


_NOT_BY_LAYER = {
    "hidden_size_per_layer_input": "gives each layer embeddings of the tokens",
    "num_kv_shared_layers": "lets layers read keys and values of others",
    "use_double_wide_mlp": "has FFNs of two widths",
}
"""Keys that make a layer more than a function of the stream before it."""


def check_family(label: str, config: PreTrainedConfig) -> None:
    """Refuse a family that is not read, and say why; a Mixture of Experts too.

    Raises:
        FactorLLMError: for such a one.
    """
    family = config.model_type
    if has_experts(config):
        raise FactorLLMError(
            f"{label} is a Mixture of Experts already ({family}); give the dense model that it is like"
        )
    if family in FAMILIES:
        return
    why = f", and it cannot be: {OTHERS[family]}" if family in OTHERS else " yet"
    known = "; ".join(f"{key} ({known.models})" for key, known in FAMILIES.items())
    known += f"; round one of them: {', '.join(WRAPPERS)}"
    raise FactorLLMError(f"{label} is of the family {family!r}, which is not supported{why}; supported: {known}")


def check_depth(label: str, layers: int, tensors: int) -> None:
    """Refuse more layers than a model's files have tensors, before anything is made for each of them.

    Raises:
        FactorLLMError: when there are more.
    """
    if layers > tensors:
        raise FactorLLMError(f"{label} says {layers} layers, and its files have {tensors} tensors; fetch both again")


def check_config(label: str, config: PreTrainedConfig) -> None:
    """Refuse a dense config that no host could follow, or of which transformers follows only a part.

    Raises:
        FactorLLMError: with the key, and why.
    """
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise FactorLLMError(
            f"{label} is quantised ({method}) and cannot be read tensor by tensor; give the unquantised "
            "checkpoint, or a GGUF file, whose quantisation can be undone"
        )
    if not isinstance(activation(config), str) or activation(config) not in ACT2FN:
        raise FactorLLMError(f"{label} uses the activation {activation(config)!r}, which transformers has not; mend it")
    for key in ("output_attentions", "output_hidden_states", "return_dict", "use_cache"):
        if not isinstance(getattr(config, key, None), bool | None):
            raise FactorLLMError(
                f"the config of {label} says {key} = {getattr(config, key)!r}, not true or false; mend it"
            )
    for key in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if not 0 < getattr(config, key, 1.0) < math.inf:
            raise FactorLLMError(f"the config of {label} says {key} = {getattr(config, key)}, not above 0; mend it")
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and not (attention and isinstance(attention, str)):
        raise FactorLLMError(f"the config of {label} says attn_implementation = {attention!r}, no name; remove it")
    for key, value, why in _OUTPUTS:
        if getattr(config, key, None) is value:
            raise FactorLLMError(f"the config of {label} says {key} = {value}, {why}; remove it")
    if not getattr(config, "is_causal", True):  # a key that transformers heeds in every family, and no engine
        raise FactorLLMError(
            f"the config of {label} says is_causal = {config.is_causal}, so its tokens see those after them, which a "
            "student and engines would not let them; use a model that writes text, or remove the key if it is one"
        )
    for key, what in _NOT_BY_LAYER.items():
        if getattr(config, key, None):
            raise FactorLLMError(
                f"the config of {label} says {key} = {getattr(config, key)}, which {what}; that is not supported yet: "
                "use a model without it"
            )
    _check_layer_types(label, config)
    _check_rope(label, config)
    _check_others(label, config)


def _check_layer_types(label: str, config: PreTrainedConfig) -> None:
    """Most families have attention in all layers, within a window in some of them."""
    kinds = set(getattr(config, "layer_types", None) or ())
    known = {"full_attention", "sliding_attention", *family_of(config).kinds}
    if others := sorted(map(str, kinds - known)):
        raise FactorLLMError(f"the config of {label} says layer_types with {others[0]}, which is not supported")
    if not ffn_layers(config):
        raise FactorLLMError(f"the config of {label} says no layer with an FFN, so there is nothing to cut; mend it")
    if "sliding_attention" in kinds and not sliding_window(config):
        raise FactorLLMError(
            f"the config of {label} says layer_types with sliding_attention and no sliding_window in use; give the "
            "window, or say full_attention"
        )


def _check_others(label: str, config: PreTrainedConfig) -> None:
    known = type(config)().to_dict()
    for key in sorted(_OF_OTHERS.keys() & config.to_dict().keys() - known.keys()):
        value = getattr(config, key)
        if _is_applied(config, key, value):
            continue
        said = value if isinstance(value, list) and key in _OF_EACH_LAYER else [value]
        if any(one is not None and one not in _OF_OTHERS[key] for one in said):
            raise FactorLLMError(
                f"the config of {label} says {key} = {str(value)[:80]}, which a {config.model_type} has not and which "
                "is not applied; if the model does compute with it, it is of another family, and if not, remove the key"
            )


def _is_applied(config: PreTrainedConfig, key: str, value: object) -> bool:
    """Whether a family does what a key says that transformers' class has not: Phi-4-mini's share stays where it was
    when it is moved to where it is applied, and Hunyuan always normalises."""
    if key == "partial_rotary_factor":
        return _rotates_parts(config) and value == rotary_share(config)
    return key == "use_qk_norm" and value is True and normalises_heads(config)


def _rotates_parts(config: PreTrainedConfig) -> bool:
    """Whether transformers' class of a family can rotate a part of each head."""
    return rotates(config) and "partial_rotary_factor" in type(config)().rope_parameters


def _check_rope(label: str, config: PreTrainedConfig) -> None:
    for one in ropes(config):
        theta = one.get("rope_theta") if isinstance(one, dict) else None
        if not isinstance(theta, int | float) or not 0 < theta < math.inf:
            raise FactorLLMError(
                f"the config of {label} says no rope_theta above 0, by which positions are rotated; mend it"
            )
    if not rotates(config):
        return
    if config.model_type == "ministral3":  # transformers computes with both whatever kind of RoPE it is
        for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
            if not isinstance(config.rope_parameters.get(key), int | float):
                raise FactorLLMError(
                    f"the config of {label} says no {key} in rope_parameters, by which transformers scales a "
                    "ministral3's queries; mend it (a llama_4_scaling_beta of 0 scales nothing)"
                )
    share = config.rope_parameters.get("partial_rotary_factor", 1)
    if share != 1 and not _rotates_parts(config):
        raise FactorLLMError(
            f"the config of {label} says partial_rotary_factor = {share}, but a {config.model_type} rotates its heads "
            "whole; if the model does not, it is of another family, and if it does, remove the key"
        )
