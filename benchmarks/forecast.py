"""How far `factorllm plan` was off: what it foretells of whole models, and what `factorllm bench` then measures.

    python benchmarks/forecast.py MODEL --text any.jsonl --work runs/forecast --out docs/speed.md --part forecast-qwen

Speed does not depend on the weights, so students are made by the cheapest recipe: nothing is fitted. What the folder
holds of an earlier run is not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import commit, in_one_line, markdown_table, replace_part
from rich.console import Console
from speed import factorized

from factorllm import parse_recipe, plan
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.run import run_bench


@in_one_line
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

    console, rows, errors = Console(width=120), [], {}
    recipes = [one for name in options.recipes for one in (parse_recipe(name), parse_recipe(name).static_prune())]
    made = [factorized(options.model, options.work / one.name, one, options.text) for one in recipes]
    timed = Plan(rounds=options.rounds, prompts=(512,), batches=(1,))
    for kind in options.types:
        said = {one.expected.name: one.expected for one in plan(options.model, (kind,), console=console).choices}
        out = options.work / kind
        if not (out / "speed.json").exists():
            run_bench(made[0], [options.model, *made[1:]], "llamacpp", kind, timed, out, console)
        speed = json.loads((out / "speed.json").read_text())
        first, _dense, *others = speed["models"]
        for recipe, measured in zip(recipes, [first, *others], strict=True):
            rows.append([recipe.name, kind])
            for name, foretold in (("decode x1", "decode_ratio"), ("prefill 512", "prefill_ratio")):
                expected, ratio = getattr(said[recipe.name], foretold), measured["ratio_to_dense"][name][0]
                rows[-1] += [f"{expected:.2f}", f"{ratio:.2f}", f"{expected / ratio - 1:+.0%}"]
                errors.setdefault(name, []).append(abs(expected / ratio - 1))
    head = ["shape", "type"]
    head += ["decode x dense, foretold", "measured", "off by", "prefill x dense, foretold", "measured", "off by"]
    text = (
        f"`python benchmarks/forecast.py {Path(options.model).name} ...`, commit {commit()}, "
        f"{speed['plan']['rounds']} rounds; "
        f"largest errors: {max(errors['decode x1']):.0%} of decoding, {max(errors['prefill 512']):.0%} of prefill.\n\n"
        + markdown_table(head, rows)
    )
    print(text)
    replace_part(options.out, options.part, text)


if __name__ == "__main__":
    main()
