"""What a dense model's files must hold, so that what is read is the model that its config says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from factorllm.dense.families import family_of, ffn_layers
from factorllm.dense.names import HEAD, layer_prefix
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.finite import is_finite

Shapes = Mapping[str, tuple[int, ...]]


def check_names(
    label: str, config: PreTrainedConfig, names: Iterable[str], wanted: Iterable[str], missing: list[str]
) -> None:
    """Refuse files that lack a tensor or hold one too many.

    Args:
        names: of all tensors in the files.
        wanted: of all parameters.
        missing: those of `wanted` that the files lack.

    Raises:
        FactorLLMError: with the first of them.
    """
    have = {name for name in names if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        have.discard(HEAD)
    if missing:
        raise FactorLLMError(
            f"{label} lacks {len(missing)} tensors, {min(missing)} among them: the checkpoint is incomplete, or "
            f"was not saved as a {config.model_type} for causal language modelling; fetch or save it again"
        )
    if extra := sorted(have - set(wanted)):
        raise FactorLLMError(
            f"{label} holds {len(extra)} tensors that a plain {config.model_type} model does not have, "
            f"{extra[0]} among them; leaving them out would change the model, so it is refused"
        )


def check_ffn(label: str, config: PreTrainedConfig, names: Iterable[str]) -> None:
    """Refuse an FFN that is more than its matrices.

    Args:
        names: of all parameters.

    Raises:
        FactorLLMError: naming what else it has.
    """
    layout = family_of(config).ffn
    prefixes = tuple(layer_prefix(index) for index in ffn_layers(config))
    inside = {name.split(".", 3)[3] for name in names if name.startswith(prefixes)}
    if extra := sorted(name for name in inside if layout.holds(name) and name not in layout.names):
        raise FactorLLMError(
            f"{label} has {extra[0]} in its FFN, which belongs to all of its neurons at once; only FFNs of an up "
            "and a down matrix, with a gate or none, and without biases, can be cut exactly"
        )


def check_shapes(label: str, found: Shapes, wanted: Shapes) -> None:
    """Refuse a tensor of another shape than the config says.

    Raises:
        FactorLLMError: with the first of them.
    """
    for name, shape in wanted.items():
        if found[name] != shape:
            raise FactorLLMError(
                f"{label}: tensor {name} is {_sizes(found[name])}, but its config says {_sizes(shape)}; fetch both "
                "again, or mend the config (vocab_size, after tokens were added)"
            )


def check_tokenizer(label: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer of which a token for text, or the begin or end token, has no row in the embedding table.

    Args:
        rows: of the embedding table.

    Raises:
        FactorLLMError: when there is such a token.
    """
    with refusing(f"the tokenizer of {label}", "it is damaged: use another copy"):
        special = set(tokenizer.all_special_ids)
        past = [index for index in tokenizer.get_vocab().values() if index >= rows and index not in special]
        past += [index for index in (tokenizer.eos_token_id, tokenizer.bos_token_id) if (index or 0) >= rows]
    if past:
        raise FactorLLMError(
            f"the tokenizer of {label} has {len(tokenizer)} tokens, but the embedding table has {rows} rows; "
            "use the tokenizer that belongs to these weights"
        )


def check_finite(value: torch.Tensor, name: str, label: str) -> torch.Tensor:
    """A tensor that was read, if all of it are numbers.

    Raises:
        FactorLLMError: when it holds NaN or infinity.
    """
    if not is_finite(value):
        raise FactorLLMError(
            f"{label}: tensor {name} holds NaN or infinite values, so nothing can be fitted to it; "
            "the file is damaged or the model diverged: use another copy"
        )
    return value


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
