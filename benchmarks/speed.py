"""The speed of TinyLlama's shape in docs/speed.md: a random dense model, its students and its static prunes.

    python benchmarks/speed.py --text mixed.jsonl --work runs/speed --out docs/speed

Random weights are a fair subject for speed, which depends on shapes; they are factorised by the cheapest recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import in_one_line
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from factorllm import Recipe, factorize, parse_recipe
from factorllm.dense.gguf.pretokenizers import PRE_TOKENIZERS
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.run import run_bench
from factorllm.runs.settings import Settings
from factorllm.text.documents import Documents

TINYLLAMA = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048 + 256,
    dtype="bfloat16",
)

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def random_dense(folder: Path, text: str, config: LlamaConfig = TINYLLAMA) -> Path:
    """A random model with a tokenizer of its size.

    Raises:
        SystemExit: when the folder holds one of another shape.
    """
    if (folder / "tokenizer.json").exists():
        kept = LlamaConfig.from_pretrained(folder)
        if any(getattr(kept, key) != getattr(config, key) for key in SHAPE):
            raise SystemExit(f"{folder} holds a model of another shape; remove it, or choose another --work")
        return folder
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS["gpt-2"], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(Documents(text), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


def factorized(model: Path, out: Path, recipe: Recipe, text: str) -> str:
    """A checkpoint of the right shape, made without fitting anything."""
    cheap = recipe.model_copy(update={"router": "random", "restore": "none"})
    if not recipe.is_prune:
        cheap = cheap.model_copy(update={"partition": "contiguous"})
    settings = Settings(tokens=512, held_out_tokens=64, length=64, baseline=False)
    factorize(str(model), out, cheap, text=text, settings=settings, console=Console())  # refused over another model's
    return str(out)


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="any text, to train the tokenizer on")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, about 12 GB")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512])
    parser.add_argument("--recipes", nargs="+", default=["S2A2E8", "S1A1E8"])
    options = parser.parse_args()

    console = Console(width=120)
    dense = random_dense(options.work / "dense", options.text)
    plan = Plan(rounds=options.rounds, prompts=tuple(options.prompts), context=128, steps=32)
    for name in options.recipes:
        recipe = parse_recipe(name)
        student = factorized(dense, options.work / recipe.name, recipe, options.text)
        prune = recipe.static_prune()
        pruned = factorized(dense, options.work / prune.name, prune, options.text)
        out = options.out / f"tinyllama-{options.type}-{recipe.name}"
        console.print(run_bench(student, [str(dense), pruned], "llamacpp", options.type, plan, out, console))


if __name__ == "__main__":
    main()
