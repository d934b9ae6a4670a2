"""Intuition-MoR1E (arXiv 2404.08985) for a student: adapters of rank-1 experts, mixed by a routing matrix for each kind
of text.

`y = W x + B R^T A x` with A (r, d) and B (o, r) of peft's LoRA, and R (r, r), which weighs the r r rank-1 experts
`b_j a_i^T`. The paper makes R of the prompt's similarity to cluster centres and of each token. Here it is
`R = sum_k p_k R_k`, p the intuition's probabilities over kinds, so that each kind's `B R_k^T A` is an ordinary LoRA,
and a mixture of kinds is a mixture of LoRAs, which engines can run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from factorllm.dense.names import place_in_layers
from factorllm.dense.safetensors import open_folder
from factorllm.errors import FactorLLMError
from factorllm.healing.students import with_adapters_of
from factorllm.hosts import host_of
from factorllm.student.adapters import Adapter, LowRank, Mixture, spans
from factorllm.student.routers import is_router
from factorllm.text.intuition import Intuition

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

_STEP = 3.0
"""Of a routing matrix's entries, in steps of A and B: they are about 1, and A's and B's some hundredths. With 10 and 30
kinds are learned by heart (docs/experiments/2026-11.md)."""

_SHORTEST = 32
"""Tokens of a piece of a document that is looked at for kinds."""

_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".o_proj")

_A, _B, _ROUTING = ".lora_A.default.weight", ".lora_B.default.weight", ".lora_A.default.steps"


class RoutedA(nn.Linear):
    """peft's A followed by the routing matrix: x to `R^T A x`, `R_k = 1 + 3 steps_k`, so all kinds begin as one."""

    def __init__(self, a: nn.Linear, mixture: Mixture):
        super().__init__(a.in_features, a.out_features, bias=False, device=a.weight.device)
        self.weight, self._mixture = a.weight, mixture
        rank = a.out_features
        self.steps = nn.Parameter(torch.zeros(mixture.intuition.kinds, rank, rank, device=a.weight.device))

    def forward(self, inputs: Tensor) -> Tensor:
        found = linear(inputs, self.weight)
        of_kinds = self._mixture.of(inputs)[..., None] * found[..., None, :]
        return found + _STEP * of_kinds.flatten(-2) @ self.steps.flatten(0, 1)


def check_whole(student: Path) -> None:
    """Refuse the text model of a vision-language model.

    Raises:
        FactorLLMError: when the student is one.
    """
    if open_folder(student, str(student))[1]:
        raise FactorLLMError(
            f"{student} is a vision-language model, and adapters of its text model would not be found in the whole by "
            "their names; use --train lora, which is merged"
        )


def find_kinds(tokens: Tensor, tokenizer: PreTrainedTokenizerBase, kinds: int, seed: int) -> Intuition:
    """Kinds of the documents in a text, by k-means.

    Args:
        tokens: (sequences, length), packed of documents.

    Raises:
        FactorLLMError: for fewer documents than kinds.
    """
    rows = tokens.tolist()
    pieces = [row[span] for row in rows for span in spans(row, tokenizer.eos_token_id)]
    texts = [tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces if len(piece) >= _SHORTEST]
    if len(texts) < kinds:
        raise FactorLLMError(
            f"the text to heal on has {len(texts)} documents, which cannot be of {kinds} kinds; use fewer --kinds, or "
            "more --tokens"
        )
    return Intuition.from_documents(texts, kinds, seed)


def with_routing(model: PreTrainedModel, rank: int, mixture: Mixture) -> nn.Module:
    """The model to train: frozen, with adapters of attention and of the FFNs' parts that always run.

    Routed experts have none: engines have no LoRA for them.
    """
    from peft.tuners.lora import LoraLayer

    mixture.watch(model)
    learner = with_adapters_of(model, lora_config(model, rank))
    for layer in learner.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A["default"] = RoutedA(layer.lora_A["default"], mixture)
    return learner


def lora_config(model: PreTrainedModel, rank: int) -> LoraConfig:
    """peft's config of each kind's adapter."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, task_type="CAUSAL_LM")
    config.target_modules = _targets(model)  # given above, it would be a set, and its file not the same each time
    return config


def _targets(model: PreTrainedModel) -> list[str]:
    host = host_of(model.config)

    def has_adapter(name: str) -> bool:
        place = place_in_layers(name)
        if is_router(f"{name}.weight") or name.endswith("shared_expert_gate"):
            return False
        # Nemotron-H calls attention what it calls its FFNs.
        is_attention = place is not None and (place[1] == "self_attn" or name.endswith(_ATTENTION))
        return is_attention or host.is_of_ffn(name, model.config)

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({".".join(name.split(".")[-2:]) for name in filter(has_adapter, names)})


def plain_adapters(state: dict[str, Tensor], kinds: int) -> list[Adapter]:
    """Each kind's LoRA, `B R_k^T` and A, from the state of a trained model."""
    names = [name.removesuffix(_A) for name in state if name.endswith(_A)]

    def of_kind(name: str, kind: int) -> LowRank:
        a, b, steps = (state[name + part].float() for part in (_A, _B, _ROUTING))
        return LowRank(a, b @ (torch.eye(len(a)).to(steps) + _STEP * steps[kind]).T)

    return [{name.removeprefix("base_model.model."): of_kind(name, kind) for name in names} for kind in range(kinds)]
