"""Text from a loaded model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and its greedy continuation, on one line."""
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
