"""RoPE in GGUF files, in both directions: keys and `rope_freqs` of a file, and transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from factorllm.dense.gguf.keys import Keys
from factorllm.errors import FactorLLMError

_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # of YaRN, in llama.cpp and in transformers
_LOW, _HIGH = 1.0, 4.0  # turns of llama3 scaling in all of Meta's models
_READ_FACTORS = ("llama", "granitemoe", "granite", "mistral3", "exaone4")  # architectures with `rope_freqs`
_READ_BETAS = ("mistral3",)  # architectures that heed what a file says of YaRN's betas
_STRETCHED = ("hunyuan-dense", "hunyuan-moe")  # architectures whose models say `alpha`, and call it dynamic
_NOT_ROTATED = 1e30  # a frequency that is divided by it is none
_CLOSE = 1e-4  # relative: factors are stored as fp32


def read_rope(keys: Keys, context: int, factors: Tensor | None, head_dim: int) -> dict:
    """`rope_parameters` that rotate as llama.cpp does for a file.

    Args:
        keys: the file's, below its architecture.
        context: tokens that the model was trained on.
        factors: the tensor `rope_freqs`, what each frequency is divided by: (head_dim / 2,); None when it is not there.

    Raises:
        FactorLLMError: for a kind of scaling that transformers has not, or that is said twice.
    """
    rope = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    keys.refuse_unless("rope.scaling.finetuned", False, True)  # it changes nothing
    kind = keys.text("rope.scaling.type", "linear")  # llama.cpp's default too; without a factor it scales nothing
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if kind == "yarn":
        rope |= _read_yarn(keys, context, factor)
    elif kind in ("none", "linear"):
        keys.refuse_unless("rope.scaling.attn_factor", 1.0)
        rope |= {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else _DEFAULT
    else:
        raise keys.refusal("rope.scaling.type", kind)
    if factors is None or torch.equal(factors, torch.ones_like(factors)):
        return rope
    if rope["rope_type"] != "default":
        raise FactorLLMError(f"{keys.label} scales RoPE twice, by rope.scaling.* and by rope_freqs; {keys.instead}")
    return rope | _read_llama3(keys, factors, rope["rope_theta"], head_dim)


_DEFAULT = {"rope_type": "default"}


def _read_yarn(keys: Keys, context: int, factor: float) -> dict:
    keys.refuse_unless("rope.scaling.yarn_ext_factor", 1.0)
    keys.refuse_unless("rope.scaling.yarn_log_multiplier", 0.0)
    # llama.cpp would take the usual ones whatever the file says, in the architectures that are read here.
    keys.refuse_unless("rope.scaling.yarn_beta_fast", _BETA_FAST)
    keys.refuse_unless("rope.scaling.yarn_beta_slow", _BETA_SLOW)
    keys.refuse_unless("rope.scaling.yarn_attn_factor", 1.0)
    scaled = keys.number("rope.scaling.attn_factor", 1.0)
    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
        "beta_fast": _BETA_FAST,
        "beta_slow": _BETA_SLOW,
    }
    return yarn | ({"attention_factor": scaled * yarn_attention(factor)} if scaled != 1 else {})


def yarn_attention(factor: float) -> float:
    """What YaRN scales queries and keys by, unless something else is said (arXiv 2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_llama3(keys: Keys, factors: Tensor, theta: float, head_dim: int) -> dict:
    """Parameters of llama3 scaling that give these factors. Different ones may: the function is what counts."""
    factors = factors.double()
    for candidate in _llama3_candidates(factors, theta, head_dim):
        if torch.allclose(llama3_factors(candidate, theta, head_dim), factors, rtol=_CLOSE):
            return {"rope_type": "llama3"} | candidate
    raise FactorLLMError(f"{keys.label}: its rope_freqs are not those of llama3 RoPE scaling; {keys.instead}")


def _llama3_candidates(factors: Tensor, theta: float, head_dim: int) -> Iterator[dict]:
    factor = round(factors.max().item(), 4)
    common = {"factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH}
    for power in sorted(range(4, 25), key=lambda power: abs(power - 13)):  # 8192 in all of Meta's models
        yield common | {"original_max_position_embeddings": 1 << power}
    # Between its ends, the smoothed part is a straight line over the frequencies; its low end is taken as 1 turn.
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else factors * 0
    between = (smooth > 0.01) & (smooth < 0.99)
    if between.sum() >= 2:
        frequencies = _frequencies(theta, head_dim)[between]
        (slope, offset) = torch.linalg.lstsq(
            torch.stack([frequencies, torch.ones_like(frequencies)], 1), smooth[between][:, None]
        ).solution.flatten()
        high = round((1 - 1 / offset).item(), 4)
        original = round((slope * 2 * math.pi * (high - _LOW)).item())
        yield common | {"high_freq_factor": high, "original_max_position_embeddings": original}


def rope_factors(rope: dict, head_dim: int) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, where keys do not say it: (head_dim / 2,), fp64, or None."""
    match rope.get("rope_type", "default"):
        case "llama3":
            return llama3_factors(rope, rope["rope_theta"], head_dim)
        case "proportional":
            factors = torch.full((head_dim // 2,), _NOT_ROTATED, dtype=torch.float64)
            factors[: int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)] = rope.get("factor", 1.0)
            return factors
        case _:
            return None


def llama3_factors(rope: dict, theta: float, head_dim: int) -> Tensor:
    """What llama.cpp divides each rotary frequency by for llama3 RoPE scaling: (head_dim / 2,), fp64.

    As transformers' `_compute_llama3_parameters`: all turns below `low_freq_factor` are slowed down by `factor`, those
    above `high_freq_factor` are left, and those between are in between.
    """
    turns = rope["original_max_position_embeddings"] * _frequencies(theta, head_dim) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _frequencies(theta: float, head_dim: int) -> Tensor:
    return 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rope_keys(rope: dict) -> dict[str, Any]:
    """What a GGUF file must say of `rope_parameters`, where there are some, without the prefix of the architecture.

    llama3 scaling and proportional RoPE are a tensor, `rope_factors`, and no key.
    """
    if not rope:
        return {}
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        attention = _attention_factor(rope)
        fast, slow = _betas(rope)
        for key, value, usual in (
            ("yarn_beta_fast", fast, _BETA_FAST),
            ("yarn_beta_slow", slow, _BETA_SLOW),
            ("attn_factor", attention / yarn_attention(rope["factor"]), 1.0),
        ):
            if not math.isclose(value, usual, rel_tol=1e-6):
                keys[f"rope.scaling.{key}"] = float(value)
    return keys


def stretched_theta(rope: dict, head_dim: int) -> float:
    """Hunyuan's `rope_theta`, which a fixed `alpha` stretches, however long a text is: no more than another theta."""
    alpha = _alpha(rope)
    return float(rope["rope_theta"] * (alpha ** (head_dim / (head_dim - 2)) if alpha else 1))


def _alpha(rope: dict) -> float | None:
    """As transformers heeds it, in no other family."""
    return rope.get("alpha") if rope.get("rope_type") == "dynamic" else None


def _betas(rope: dict) -> tuple[float, float]:
    """YaRN's, as transformers takes them: the turns above which a frequency is left, and below which it is scaled."""
    return rope.get("beta_fast") or _BETA_FAST, rope.get("beta_slow") or _BETA_SLOW


def _attention_factor(rope: dict) -> float:
    """YaRN's, as transformers computes it."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (0.1 * rope[key] * math.log(rope["factor"]) + 1.0 for key in ("mscale", "mscale_all_dim"))
        return over / under if rope["factor"] > 1 else 1.0
    return yarn_attention(rope["factor"])


def reason_against_rope(rope: dict, architecture: str) -> str | None:
    """Why llama.cpp would rotate otherwise than transformers, or None."""
    kind = rope.get("rope_type", "default")
    if kind == "llama3" and architecture not in _READ_FACTORS:
        return f"llama.cpp's {architecture} silently ignores llama3 RoPE scaling"
    if (kind == "proportional") != (architecture == "gemma4"):
        return f"llama.cpp's {architecture} has no {kind} RoPE"
    if kind == "dynamic" and (architecture in _STRETCHED or not _alpha(rope)):
        return None  # a fixed alpha is in theta, and texts that are no longer than a model reads are not scaled
    if kind not in ("default", "linear", "yarn", "llama3", "proportional"):
        return f"GGUF files cannot say {kind} RoPE scaling"
    if kind == "yarn" and rope.get("truncate") is False:
        return "GGUF files cannot say YaRN without truncation"
    if kind == "yarn" and architecture not in _READ_BETAS and _betas(rope) != (_BETA_FAST, _BETA_SLOW):
        return (
            f"llama.cpp's {architecture} silently takes {_BETA_FAST:g} and {_BETA_SLOW:g} for YaRN's beta_fast and "
            f"beta_slow, not {' and '.join(map(str, _betas(rope)))}"
        )
    return None
