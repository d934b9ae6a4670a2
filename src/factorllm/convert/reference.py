"""Before the long work: the dense model as it is streamed, compared on a few tokens with the same model in
transformers, and a GGUF file with llama.cpp where it is installed. What differs stops the run."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.ends import Ends
from factorllm.dense.families import keep_first_layers
from factorllm.dense.gguf.file import GGUFSource
from factorllm.dense.layer import DenseLayer, LayerLoader
from factorllm.dense.model import ModelSource
from factorllm.engines import EngineProcess, Options, installed
from factorllm.errors import FactorLLMError
from factorllm.runs.finite import is_finite
from factorllm.runs.memory import available_memory

_SEQUENCES, _LENGTH = 4, 24
_FEW_LAYERS = 2  # of a model that does not fit in memory whole
_CLOSE = 1e-3  # relative: both compute in fp32
_TOP = 20  # most likely next tokens that are compared with llama.cpp's
_CLOSE_EXACT, _CLOSE_QUANTISED = 0.05, 0.3  # nats: llama.cpp rounds activations to 8 bits for quantised weights
_EXACT_TYPES = {"F32", "F16", "BF16"}

_SAMPLES = (
    "The moon is 384,400 km away; it's 1/4 as wide as the Earth.",
    "def f(x):\n    return [y**2 for y in x if y != 12345]  # squares\n\n",
    "I'LL say: DON'T!!  naïve café, Über-straße, 東京 日本語テキスト, привет 🙂",
)


@dataclass(frozen=True)
class _Streamed:
    """What the streamed model makes of a few tokens.

    Attributes:
        tokens: (sequences, length) ids.
        hidden: the stream before the first layer and after each, each (sequences, length, d).
        logits: (sequences, length, vocabulary).
    """

    tokens: Tensor
    hidden: list[Tensor]
    logits: Tensor


def check_against_references(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, length: int, device: torch.device, console: Console
) -> None:
    """Compare a dense model as it is streamed with what others compute from the same files.

    A model that does not fit in memory whole is compared with transformers in its first layers and its head.

    Args:
        length: tokens of a calibration sequence, which bounds those of the comparison.

    Raises:
        FactorLLMError: when they differ, with what differs and by how much.
    """
    config = _shortened(source)
    model = source.load_reference(config)
    # Quantised weights take their time to read, and they are the same for both.
    reader = source.with_weights_of(model) if isinstance(source, GGUFSource) else source
    streamed = _stream(reader, config.num_hidden_layers, min(length, _LENGTH), device)
    _compare_with_transformers(source, model, streamed, device)
    del model
    whole = config.num_hidden_layers == source.config.num_hidden_layers
    if isinstance(source, GGUFSource) and installed("llamacpp"):
        _compare_with_llamacpp(source, tokenizer, streamed if whole else None, console)


def _shortened(source: ModelSource) -> PreTrainedConfig:
    """The dense config, with as many layers as fit in memory."""
    config = copy.deepcopy(source.config)
    if 4 * source.parameter_count > available_memory() // 2:
        keep_first_layers(config, min(_FEW_LAYERS, config.num_hidden_layers))
    return config


@torch.inference_mode()
def _stream(source: ModelSource, layers: int, length: int, device: torch.device) -> _Streamed:
    loader = LayerLoader(source, length, torch.float32, device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, source.config.vocab_size, (_SEQUENCES, length), generator=generator)
    ends = Ends(source, device)
    hidden = [ends.embed(tokens)]
    for index in range(layers):
        layer, stream = loader.load(index), hidden[-1]
        if isinstance(layer, DenseLayer):
            middle, inputs = layer.attend(stream)
            hidden.append(layer.after(stream, middle, layer.ffn.hidden(inputs) @ layer.ffn.down.T))
        else:
            hidden.append(layer.forward(stream))
    logits = ends.logits(hidden[-1].flatten(0, 1)).view(*tokens.shape, -1)
    return _Streamed(tokens, hidden, logits)


@torch.inference_mode()
def _compare_with_transformers(
    source: ModelSource, model: PreTrainedModel, streamed: _Streamed, device: torch.device
) -> None:
    found = model.to(device).eval()(streamed.tokens.to(device), output_hidden_states=True, use_cache=False)
    # The last of transformers' hidden states is after the final norm, so the logits stand for it.
    places = ["the embeddings", *(f"layer {index}" for index in range(len(streamed.hidden) - 2)), "the logits"]
    ours = [*streamed.hidden[:-1], streamed.logits]
    for place, got, wanted in zip(places, ours, [*found.hidden_states[:-1], found.logits], strict=True):
        if not is_finite(wanted):
            raise FactorLLMError(
                f"{source.label} computes NaN or infinity in float32 ({place}), so nothing can be fitted to it; the "
                "file is damaged or the model diverged: use another copy"
            )
        error = 0.0 if torch.equal(got, wanted) else ((got - wanted).double().norm() / wanted.double().norm()).item()
        if not error < _CLOSE:  # NaN too
            raise FactorLLMError(
                f"{source.label} as it is read here is not the model that transformers loads: {place} differ by "
                f"{error:.1e} (relative). Nothing is converted, for the student would be wrong; please report this, "
                "with the model's config"
            )


def _compare_with_llamacpp(
    source: GGUFSource, tokenizer: PreTrainedTokenizerBase, streamed: _Streamed | None, console: Console
) -> None:
    """Tokens of a few texts, and the most likely next tokens after each sequence."""
    try:
        engine = EngineProcess("llamacpp", source.files[0], Options(context=4 * _LENGTH))
    except FactorLLMError as error:
        console.print(f"not compared with llama.cpp: {error}", highlight=False, soft_wrap=True, markup=False)
        return
    with engine:
        for text in _SAMPLES:
            wanted, got = engine.tokenize(text), tokenizer(text, add_special_tokens=False).input_ids
            if wanted != got:
                raise FactorLLMError(
                    f"the tokenizer of {source.label} as it is read here is not llama.cpp's: {text[:40]!r} gives "
                    f"{got[:8]} instead of {wanted[:8]}; use the model's safetensors checkpoint"
                )
        if streamed:
            wanted = [engine.next_tokens(row.tolist(), _TOP) for row in streamed.tokens]
            _compare_next(source, streamed.logits[:, -1], wanted)


def _compare_next(source: GGUFSource, logits: Tensor, wanted: list[list[tuple[int, float]]]) -> None:
    """All sequences at once: of a small model, rounded activations move a single one by more than most faults would."""
    ids, theirs = torch.tensor(wanted, dtype=torch.float64).unbind(-1)
    got = logits.double().log_softmax(-1).cpu().gather(1, ids.long())
    if not is_finite(theirs):
        raise FactorLLMError(
            f"llama.cpp computes NaN or infinity with {source.label}, which it would with a student as well; the file "
            "is damaged or its activations overflow float16: use another copy, or its safetensors checkpoint"
        )
    error = (got - theirs).abs().mean().item()
    exact = source.stored_types <= _EXACT_TYPES
    if not error < (_CLOSE_EXACT if exact else _CLOSE_QUANTISED):
        raise FactorLLMError(
            f"{source.label} as it is read here is not the model that llama.cpp computes: log-probabilities of next "
            f"tokens differ by {error:.2f} in the mean. Nothing is converted, for the student would be wrong; use the "
            "model's safetensors checkpoint, and please report this"
        )
