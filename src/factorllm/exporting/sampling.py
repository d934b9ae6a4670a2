"""How a model's answers are sampled and ended where a request does not say it, by its generation config."""

from __future__ import annotations

import gguf
from transformers import GenerationConfig

from factorllm.dense.gguf.sampling import KEYS

_UNHEEDED = (
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "sequence_bias", "stop_strings",
    "suppress_tokens", "typical_p",
)  # fmt: skip
"""What changes answers in transformers and has no key in GGUF files."""

_LARGEST = 2**31 - 1  # of a key's integers; what is no number, or below 0, says nothing


def add_sampling(writer: gguf.GGUFWriter, generation: GenerationConfig, context: int) -> None:
    """What llama.cpp samples by unless a request says otherwise.

    Args:
        context: tokens that the model reads: transformers' penalty is for all that came before, llama.cpp's for 64.
    """
    add = {int: writer.add_int32, float: writer.add_float32}
    for name, (key, kind) in KEYS.items():
        value = getattr(generation, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
            add[kind](key, kind(value))
            if name == "repetition_penalty":
                writer.add_sampling_penalty_last_n(min(context, _LARGEST))


def unheeded(generation: GenerationConfig) -> list[str]:
    """What is said of a generation config that no GGUF file can say."""
    changed = generation.to_diff_dict()
    neutral = {"num_beams": 1, "typical_p": 1.0, "encoder_repetition_penalty": 1.0}
    said = [name for name in _UNHEEDED if changed.get(name) not in (None, 0, [], neutral.get(name))]
    if not said:
        return []
    return [f"llama.cpp does not heed {' and '.join(said)} of the generation config, as transformers does"]


def ends_of(generation: GenerationConfig) -> list[int]:
    """Ids of the tokens that end an answer."""
    said = generation.eos_token_id
    return [index for index in (said if isinstance(said, list) else [said]) if isinstance(index, int)]
