"""Text from a finished checkpoint."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def complete(checkpoint: Path, prompt: str, new_tokens: int = 40) -> str:
    """The prompt and its greedy continuation, on one line."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())
