"""Text from a loaded model."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import Cache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from factorllm.dense.opening import opened
from factorllm.errors import refusing

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What transformers calls the argument; the name was changed among the versions that we work with."""


def next_logits(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Logits (sequences, vocabulary) after what the cache holds and `tokens` (sequences, n), which it holds then.

    The last positions of several sequences are no block of memory. Given such a slice on a CPU, torch multiplies each
    sequence with a copy of the head of its own, and where there is no room for them (35 GB for 128 sequences and
    151,936 tokens) it does without oneDNN from then on, in all products: eight times slower in bfloat16.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        return model(tokens.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
    finally:
        hook.remove()


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and its greedy continuation, on one line."""
    tokens = torch.tensor([opened(tokenizer, prompt)], device=model.device)
    with refusing(f"the generation config of {model.name_or_path}", "mend generation_config.json, or remove it"):
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.2,
        )
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
