"""What an expert layer costs in llama.cpp beside its weights: docs/speed.md.

    python benchmarks/fixed_cost.py --text mixed.jsonl --work runs/fixed --out docs/speed.md

Models so narrow that their weights cost next to nothing: what is left of a decoding step is the fixed cost of its
operations. The difference to the dense model is what routing adds to each layer. Models take turns.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from common import commit, in_one_line, markdown_table, replace_part
from speed import TINYLLAMA, factorized, random_dense
from transformers import LlamaConfig

from factorllm import parse_recipe
from factorllm.engines import EngineProcess, Options
from factorllm.exporting import export_gguf

NARROW = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONTEXT = 128


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="any text, to train the tokenizer on")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--recipes", nargs="+", default=["S4A0E8", "S1A1E4", "S2A2E8", "1R4E2K"])
    options = parser.parse_args()

    config = LlamaConfig.from_dict(TINYLLAMA.to_dict() | NARROW | {"num_hidden_layers": options.layers})
    dense = random_dense(options.work / "dense", options.text, config)
    models = {"dense": str(dense)}
    for name in options.recipes:
        models[name] = factorized(dense, options.work / name, parse_recipe(name), options.text)
    files = {name: options.work / f"{name}.gguf" for name in models}
    for name, model in models.items():
        export_gguf(model, files[name], "q8_0", overwrite=True)

    rows = [[name] for name in models]
    for threads in options.threads:
        seconds = step_seconds(files, threads, options.rounds, options.steps)
        for row, name in zip(rows, models, strict=True):
            row.append(f"{1000 * median(seconds[name]):.2f}")
            row.append(more_than_dense(seconds, name, options.layers))
    head = ["model"]
    for threads in options.threads:
        head += [f"ms a step, {threads} thread{'s'[: threads > 1]}", "µs a layer more than dense [quartiles]"]
    made = (
        "`python benchmarks/fixed_cost.py --text mixed.jsonl --work runs/fixed --out docs/speed.md` "
        f"at commit {commit()}: {options.layers} layers of {config.hidden_size} x {config.intermediate_size}, q8_0, "
        f"random weights, decoding at batch 1 after {CONTEXT} tokens, {options.rounds} rounds.\n\n"
    )
    replace_part(options.out, "fixed-cost", made + markdown_table(head, rows))


def step_seconds(files: dict[str, Path], threads: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a decoding step of each model, round by round."""
    loaded = Options(context=CONTEXT + steps + 8, decode_threads=threads, prefill_threads=threads)
    with ExitStack() as stack:
        engines = {name: stack.enter_context(EngineProcess("llamacpp", file, loaded)) for name, file in files.items()}
        for engine in engines.values():
            engine.decode(1, CONTEXT, steps)  # warms up
        found = {name: [] for name in engines}
        for _ in range(rounds):
            for name, engine in engines.items():
                found[name].append(engine.decode(1, CONTEXT, steps))
    return found


def more_than_dense(seconds: dict[str, list[float]], name: str, layers: int) -> str:
    """Microseconds a layer, of each round against the dense model in the same round."""
    more = [1e6 * (own - dense) / layers for own, dense in zip(seconds[name], seconds["dense"], strict=True)]
    low, _, high = quantiles(more, n=4)
    return "" if name == "dense" else f"{median(more):.1f} [{low:.1f} to {high:.1f}]"


if __name__ == "__main__":
    main()
