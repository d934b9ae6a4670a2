"""The architectures that students are written in, so that engines load them as they are. One file a host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from transformers import PreTrainedConfig

from factorllm.dense.families import FAMILIES, is_dense
from factorllm.errors import FactorLLMError
from factorllm.hosts.base import Host, MoeHost, StudentFFN
from factorllm.hosts.cohere2_moe import Cohere2MoeHost
from factorllm.hosts.dense import DenseHost
from factorllm.hosts.ernie4_5_moe import Ernie45MoeHost
from factorllm.hosts.flex_olmo import FlexOlmoHost
from factorllm.hosts.gemma4 import Gemma4Host
from factorllm.hosts.glm4_moe import Glm4MoeHost
from factorllm.hosts.granitemoe import GraniteMoeHost
from factorllm.hosts.granitemoe_swa import GraniteMoeSWAHost
from factorllm.hosts.granitemoehybrid import GraniteMoeHybridHost
from factorllm.hosts.granitemoeshared import GraniteMoeSharedHost
from factorllm.hosts.hunyuan_v1_moe import HunYuanMoeHost
from factorllm.hosts.lfm2_moe import Lfm2MoeHost
from factorllm.hosts.mixtral import MixtralHost
from factorllm.hosts.nemotron_h import NemotronHHost
from factorllm.hosts.qwen2_moe import Qwen2MoeHost
from factorllm.hosts.qwen3_5_moe import Qwen35MoeHost
from factorllm.hosts.qwen3_moe import Qwen3MoeHost
from factorllm.hosts.qwen3_vl_moe import Qwen3VLMoeHost
from factorllm.recipe import Shape

__all__ = ["HOSTS", "Host", "MoeHost", "StudentFFN", "choose_host", "host_of"]

_HOSTS = (
    MixtralHost(), GraniteMoeSharedHost(), GraniteMoeHost(), Qwen3MoeHost(), Qwen2MoeHost(), Glm4MoeHost(),
    GraniteMoeSWAHost(), Qwen35MoeHost(), GraniteMoeHybridHost(), Lfm2MoeHost(), Gemma4Host(), FlexOlmoHost(),
    Cohere2MoeHost(), HunYuanMoeHost(), Ernie45MoeHost(), Qwen3VLMoeHost(), NemotronHHost(), DenseHost(),
)  # fmt: skip

HOSTS: dict[str, Host] = {host.name: host for host in _HOSTS}
"""Hosts by name, best first: `auto` takes the first that can hold the student exactly."""


def host_of(config: PreTrainedConfig) -> Host:
    """The host that a checkpoint is in, a dense one or a static prune among them."""
    return HOSTS["dense" if is_dense(config) else config.model_type]


def choose_host(name: str, config: PreTrainedConfig, shape: Shape) -> Host:
    """The host that `name` says (`auto`: the first that is exact for this model and recipe).

    Raises:
        FactorLLMError: when no host, or not the named one, can hold the student exactly; says why, and what one can.
    """
    family = FAMILIES[config.model_type]
    if family.no_host and shape.experts:
        raise FactorLLMError(
            f"no architecture with experts reproduces {config.model_type} ({family.models}) exactly: "
            f"{family.no_host}; a static prune needs none: factorllm prune"
        )
    if name == "auto":
        fitting = [host for host in HOSTS.values() if host.holds(config)]
        reasons = {host.name: host.reason_against(config, shape) for host in fitting}
        for candidate, reason in reasons.items():
            if reason is None:
                return HOSTS[candidate]
        why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise FactorLLMError(f"no host can hold this student exactly: {why}; {_instead(config, shape, fitting)}")
    if name not in HOSTS:
        raise FactorLLMError(f"no host {name!r}; hosts: auto, {', '.join(HOSTS)}")
    if reason := HOSTS[name].reason_against(config, shape):
        raise FactorLLMError(f"host {name} cannot hold this student exactly: {reason}; --host auto picks one that can")
    return HOSTS[name]


def _instead(config: PreTrainedConfig, shape: Shape, hosts: Iterable[Host]) -> str:
    """What can be held and leaves as much out: with fewer parts that always run, or none, or a static prune."""
    if shape.experts and not shape.overlaps:
        width = shape.expert_width
        parts, active = shape.ffn_width // width, shape.active_width // width
        for shared in (1, 0):
            other = replace(shape, shared_width=shared * width, experts=parts - shared, top_k=active - shared)
            if other.top_k and any(host.reason_against(config, other) is None for host in hosts):
                dense = f"D{shape.leading_dense}" if shape.leading_dense else ""
                return f"--recipe S{shared}A{other.top_k}E{parts}{dense} leaves as much out, and can be held"
    prune = Shape(shape.ffn_width, shape.active_width, 0, shape.expert_width, 0)
    if shape.experts and HOSTS["dense"].reason_against(config, prune) is None:
        return "a static prune needs none: factorllm prune"
    return "use another model"
