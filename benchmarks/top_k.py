"""One checkpoint, every top-k: quality against active parameters of a student whose top-k is chosen at serve time.

    python benchmarks/top_k.py --text mixed.jsonl --work runs/top-k --out docs/results.md

The host is glm4_moe. Restored students are fitted for the top-k of their recipe, so they are made for each of
`--recipes` and once without restore, which with all experts on is the dense model exactly.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import commit, in_one_line, markdown_table, replace_part
from rich.console import Console
from transformers import AutoModelForCausalLM

from factorllm import factorize, parse_recipe
from factorllm.demo import demo_model
from factorllm.dense import open_model
from factorllm.measure.cost import cost_of
from factorllm.measure.perplexity import perplexity
from factorllm.runs.settings import Settings
from factorllm.text import read_calibration_text
from factorllm.text.calibration import public_name


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--recipes", nargs="+", default=["S2A2E8", "S2A4E8"])
    parser.add_argument("--work", type=Path, required=True, help="folder for the students")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page")
    arguments = parser.parse_args()

    settings = Settings(
        tokens=arguments.tokens, held_out_tokens=arguments.held_out_tokens, host="glm4_moe", baseline=False
    )
    source = open_model(arguments.model)
    held_out = read_calibration_text(arguments.text, source.tokenizer(), settings).held_out
    recipes = {f"{text}, restored": parse_recipe(text) for text in arguments.recipes}
    recipes["not restored"] = parse_recipe(arguments.recipes[0]).model_copy(update={"restore": "none"})

    dense = perplexity(source.load_model(torch.float32, torch.device("cpu")), held_out)
    shape = parse_recipe(arguments.recipes[0]).shape(source.config.intermediate_size)
    counts = range(1, shape.experts + 1)
    found = {}
    for name, recipe in recipes.items():
        folder = arguments.work / name.replace(",", "").replace(" ", "-")
        # Done already where the same was asked before, and refused where it was something else.
        factorize(arguments.model, folder, recipe, text=arguments.text, settings=settings, console=Console())
        found[name] = [perplexity_at(folder, top_k, held_out) for top_k in counts]

    rows = []
    for index, top_k in enumerate(counts):
        active = cost_of(source.config, replace(shape, top_k=top_k)).active_parameters
        values = (f"{values[index]:,.1f} ({values[index] / dense:,.2f} x)" for values in found.values())
        rows.append([str(top_k), f"{active / 1e6:.1f} M", *values])
    made = (
        f"`python benchmarks/top_k.py --text {Path(arguments.text).name} --tokens {arguments.tokens} --held-out-tokens "
        f"{arguments.held_out_tokens} --recipes {' '.join(arguments.recipes)} --work runs/top-k --out docs/results.md` "
        f"at commit {commit()}: {public_name(arguments.model)}, fp32, seed 0, dense perplexity {dense:.2f}.\n\n"
    )
    replace_part(arguments.out, "top-k", made + markdown_table(["top-k", "active", *found], rows))


def perplexity_at(folder: Path, top_k: int, held_out: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=top_k, dtype=torch.float32).eval()
    return perplexity(model, held_out)


if __name__ == "__main__":
    main()
