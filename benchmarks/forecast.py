"""How far `factorllm plan` was off: what it foretells of whole models, and what `factorllm bench` then measures.

    python benchmarks/forecast.py MODEL --text any.jsonl --work runs/forecast --out docs/speed.md

Speed does not depend on the weights, so students are made by the cheapest recipe: nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import commit, markdown_table, replace_part
from rich.console import Console
from speed import factorized

from factorllm import parse_recipe, plan
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.run import run_bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense model")
    parser.add_argument("--text", required=True, help="any text")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page")
    parser.add_argument("--part", required=True, help="part of the page to replace")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--recipes", nargs="+", default=["S2A2E8", "S1A1E8"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    console, rows, errors = Console(width=120), [], []
    recipes = [parse_recipe(name) for name in options.recipes]
    made = {
        one.name: factorized(options.model, options.work / one.name, one, options.text)
        for recipe in recipes
        for one in (recipe, recipe.static_prune())
    }
    for kind in options.types:
        said = {one.expected.name: one.expected for one in plan(options.model, (kind,), console).choices}
        for recipe in recipes:
            names = {"dense": "dense", "student": recipe.name, "pruned": recipe.static_prune().name}
            timed = Plan(rounds=options.rounds, prompts=(512,), batches=(1,))
            out = options.work / f"{kind}-{recipe.name}"
            run_bench(
                made[names["student"]], [options.model, made[names["pruned"]]], "llamacpp", kind, timed, out, console
            )
            for measured in json.loads((out / "speed.json").read_text())["models"]:
                expected = said[names[measured["name"]]]
                ratio = measured["ratio_to_dense"]["decode x1"][0]
                if expected.recipe:
                    errors.append(abs(expected.decode_ratio / ratio - 1))
                    rows.append(
                        [
                            expected.name,
                            kind,
                            f"{expected.decode_ratio:.2f}",
                            f"{ratio:.2f}",
                            f"{expected.decode_ratio / ratio - 1:+.0%}",
                            f"{expected.prefill_ratio:.2f}",
                            f"{measured['ratio_to_dense']['prefill 512'][0]:.2f}",
                        ]
                    )
    head = ["shape", "type", "decode x dense, foretold", "measured", "off by", "prefill x dense, foretold", "measured"]
    text = (
        f"`python benchmarks/forecast.py {Path(options.model).name} ...`, commit {commit()}, {options.rounds} rounds; "
        f"largest error of a decoding ratio {max(errors):.0%}.\n\n" + markdown_table(head, rows)
    )
    print(text)
    replace_part(options.out, options.part, text)


if __name__ == "__main__":
    main()
