"""Every partition method, router, prior and restore at 50 % FFN sparsity, on one model and one text: docs/results.md.

    python benchmarks/methods.py --work runs/methods --tokens 12288 --out docs/results.md

All methods go through the layers together, so the teacher is computed once. A killed run resumes. Every row has the
same active parameters: S2A2E8, partition energy, router refined, prior energy, unless it says otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from common import commit, in_one_line, markdown_table, replace_part
from rich.console import Console

from factorllm import Recipe
from factorllm.convert.factorize import compare
from factorllm.convert.partition import METHODS
from factorllm.demo import demo_model, demo_text
from factorllm.recipe import RouterName
from factorllm.report import ModelRow
from factorllm.report.summary import mean_agreement
from factorllm.runs.settings import Settings
from factorllm.text.calibration import public_name

S2A2E8 = {"shared": 2, "active": 2, "parts": 8}


def recipes() -> dict[str, dict]:
    """Rows of the table by name: the recipe without its `restore`."""
    rows = {"static prune": {"shared": 4, "active": 0, "parts": 8}}
    rows |= {f"partition {name}": S2A2E8 | {"partition": name} for name in METHODS}
    rows |= {f"router {name}": S2A2E8 | {"router": name} for name in get_args(RouterName) if name != "refined"}
    rows["router pa, prior paper"] = S2A2E8 | {"router": "pa", "prior": "paper"}
    rows["1R4E2K, random split, router pa, prior paper"] = {
        "shared": 0, "active": 2, "parts": 4, "partition": "random", "router": "pa", "prior": "paper"
    }  # fmt: skip
    return rows


def all_students() -> dict[str, Recipe]:
    """Each recipe without and with restore, by a name that can be a folder's."""
    return {
        f"{folder_name(name)}-{restore}": Recipe(**recipe, restore=restore)
        for name, recipe in recipes().items()
        for restore in ("none", "stream")
    }


def folder_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def table(rows: list[ModelRow], layers: dict[str, list[dict]]) -> str:
    perplexity = {row.name: row.perplexity for row in rows}
    dense = perplexity["dense"]
    lines = []
    for name in recipes():
        cells = [name]
        for restore in ("none", "stream"):
            value = perplexity[f"{folder_name(name)}-{restore}"]
            cells += [f"{value:,.1f}", f"{value / dense:,.2f}"]
        agreement = mean_agreement(layers[f"{folder_name(name)}-stream"])
        lines.append([*cells, "-" if agreement is None else f"{agreement:.0%}"])
    head = ["method", "no restore", "x dense", "restored", "x dense", "router agrees"]
    return f"Dense perplexity: {dense:.2f}.\n\n" + markdown_table(head, lines)


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--text", default=demo_text())
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished work")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page with the marks")
    arguments = parser.parse_args()
    settings = Settings(tokens=arguments.tokens, held_out_tokens=arguments.held_out_tokens)
    rows, layers = compare(
        arguments.model, arguments.work, all_students(), text=arguments.text, settings=settings, console=Console()
    )
    made = (
        f"`python benchmarks/methods.py --tokens {arguments.tokens} --held-out-tokens {arguments.held_out_tokens} "
        f"--work runs/methods --out docs/results.md` at commit {commit()}: "
        f"{public_name(arguments.model)}, {public_name(arguments.text)}, fp32, seed 0.\n\n"
    )
    replace_part(arguments.out, "methods", made + table(rows, layers))


if __name__ == "__main__":
    main()
