"""Every method at 25, 50 and 75 % FFN sparsity, on one model and one text, with the benchmark tasks: docs/results.md.

    python benchmarks/scoreboard.py --text mixed.jsonl --data ../shared/eval --work runs/board --out docs/results.md

All methods have the same calibration tokens and, at one sparsity, the same active FFN neurons (the depth prune: as many
parameters as whole layers allow). Those that split or keep neurons share one restore; FLAP has its own, a bias; a depth
prune has none. A killed run goes on where it was. Numbers of each task are in scoreboard.json beside the plot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from page import commit, markdown_table, replace_part
from rich.console import Console
from transformers import PreTrainedModel

from factorllm import Recipe, parse_recipe
from factorllm.baselines import block_influence, depth_prune, flap_prune, layers_to_drop
from factorllm.baselines.depth import shortened_cost
from factorllm.checkpoint import write_json
from factorllm.demo import demo_model
from factorllm.evaluate import Cost, cost_of, perplexity
from factorllm.evaluate.agreement import agreement
from factorllm.evaluate.cost import dense_shape
from factorllm.evaluate.tasks import Score, check_tasks, retention, run_task
from factorllm.pipeline import compare
from factorllm.progress import Clock
from factorllm.settings import Settings
from factorllm.sources import ModelSource, open_model, read_calibration_text
from factorllm.sources.text import public_name

ACTIVE_PARTS = {25: 6, 50: 4, 75: 2}
"""Parts of 8 that run for a token, by FFN sparsity in percent."""

TASKS = ("arc_easy", "piqa", "boolq", "copa", "lambada_openai")

METHODS = {
    "ours": "**FactorLLM (ours)**",
    "static": "static prune, energy",
    "flap": "FLAP-style prune",
    "depth": "depth prune, ShortGPT",
    "cmoe": "CMoE",
    "moefication": "MoEfication",
    "llama-moe": "LLaMA-MoE",
    "factorllm-paper": "FactorLLM as published, 1R4E*k*K",
}


def recipes() -> dict[str, Recipe]:
    """Every student of the restore that all share, by `method-sparsity`."""
    found = {}
    for percent, active in ACTIVE_PARTS.items():
        half = active // 2
        texts = {
            "ours": f"S{half}A{half}E8",
            "static": f"S{active}A0E8",
            "cmoe": f"cmoe:S{half}A{half}E8",
            "moefication": f"moefication:S0A{active}E8",
            "llama-moe": f"llama-moe:S0A{active}E8",
            "factorllm-paper": f"factorllm-paper:1R4E{half}K",
        }
        found |= {f"{method}-{percent}": parse_recipe(text) for method, text in texts.items()}
    return found


class Board:
    """What was measured so far, kept on disk.

    Args:
        made: what decides the numbers; a board of something else is not gone on with.
    """

    def __init__(self, path: Path, made: dict, rate: Callable[[PreTrainedModel], dict], console: Console):
        self.path, self._rate, self._console, self._clock = path, rate, console, Clock()
        self.content = json.loads(path.read_text()) if path.exists() else {"made": made, "seconds": 0.0, "models": {}}
        if self.content["made"] != made:
            raise SystemExit(f"{path} was measured with other arguments; remove it or choose another --work")

    def __contains__(self, name: str) -> bool:
        return name in self.content["models"]

    def add(self, name: str, model: PreTrainedModel, cost: Cost) -> None:
        if name in self:
            return
        numbers = self._rate(model)
        self.content["models"][name] = asdict(cost) | numbers
        self.content["seconds"] += (seconds := self._clock.lap())
        write_json(self.path, self.content)
        self._console.print(f"{name}: perplexity {numbers['perplexity']:.2f} ({seconds:.0f} s)")


def rate_dense_baselines(
    board: Board, source: ModelSource, tokens: torch.Tensor, load: Callable[[], PreTrainedModel]
) -> None:
    """FLAP and the depth prune, which change a loaded dense model."""
    config = source.config
    influence = None
    for percent, active in ACTIVE_PARTS.items():
        shape = Recipe(shared=active, active=0, parts=8).shape(config.intermediate_size)
        if (name := f"flap-{percent}") not in board:
            model = load()
            flap_prune(model, tokens, shape.shared_width)
            board.add(name, model, cost_of(config, shape))
        if (name := f"depth-{percent}") not in board:
            model = load()
            influence = block_influence(model, tokens) if influence is None else influence
            count = layers_to_drop(config, cost_of(config, shape).active_parameters)
            depth_prune(model, influence, count)
            board.add(name, model, shortened_cost(config, count))


def table(models: dict[str, dict]) -> str:
    dense = models["dense"]
    head = [
        "method",
        "active",
        "perplexity",
        "x dense",
        "KL to dense",
        "top-1 agrees",
        "5 tasks",
        "kept",
        "above chance",
    ]
    rows = [row("dense", dense, dense)]
    for percent in ACTIVE_PARTS:
        rows.append([f"*{percent} % FFN sparsity*", *[""] * (len(head) - 1)])
        rows += [row(title, models[f"{method}-{percent}"], dense) for method, title in METHODS.items()]
    return markdown_table(head, rows)


def row(title: str, found: dict, dense: dict) -> list[str]:
    values = [score["value"] for score in found["scores"].values()]
    error = sum(score["error"] ** 2 for score in found["scores"].values()) ** 0.5 / len(values)
    plain, above = kept(found, dense)
    return [
        title,
        f"{found['active_parameters'] / 1e6:.1f} M",
        f"{found['perplexity']:,.1f}",
        f"{found['perplexity'] / dense['perplexity']:,.2f}",
        f"{found['kl']:.3f}",
        f"{found['top_1']:.1%}",
        f"{sum(values) / len(values):.1%} ± {error:.1%}",
        f"{plain:.1%}",
        f"{above:.1%}",
    ]


def kept(found: dict, dense: dict) -> tuple[float, float]:
    return retention(*({task: Score(**score) for task, score in one["scores"].items()} for one in (found, dense)))


def plot(models: dict[str, dict], path: Path) -> None:
    """Perplexity and retention against active parameters, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = models["dense"]
    panels = {
        "perplexity, x dense": lambda found: found["perplexity"] / dense["perplexity"],
        "five tasks, above-chance retention": lambda found: kept(found, dense)[1],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, (label, value) in zip(axes, panels.items(), strict=True):
        for method, title in METHODS.items():
            points = [dense, *(models[f"{method}-{percent}"] for percent in ACTIVE_PARTS)]
            active = [point["active_parameters"] / 1e6 for point in points]
            width = 2.5 if method == "ours" else 1
            axis.plot(active, [value(point) for point in points], marker="o", linewidth=width, label=title.strip("*"))
        axis.set_xlabel("active parameters, M")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--data", type=Path, required=True, help="folder of <task>.jsonl")
    parser.add_argument("--limit", type=int, help="questions of each task; default all")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished work")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page; the rest goes into scoreboard/")
    arguments = parser.parse_args()
    check_tasks(list(TASKS), arguments.data)
    console = Console()

    settings = Settings(tokens=arguments.tokens, held_out_tokens=arguments.held_out_tokens)
    source = open_model(arguments.model)
    settings = settings.resolve(source.config)
    tokenizer = source.tokenizer()
    text = read_calibration_text(
        arguments.text,
        tokenizer,
        tokens=settings.tokens,
        held_out_tokens=settings.held_out_tokens,
        length=settings.length,
        seed=settings.seed,
        load_model=lambda: None,
    )

    def load() -> PreTrainedModel:
        return source.load_model(settings.compute_dtype, settings.torch_device)

    dense = load()

    def rate(model: PreTrainedModel) -> dict:
        near = agreement(dense, model, text.held_out)
        scores = {task: run_task(model, tokenizer, task, arguments.data, arguments.limit) for task in TASKS}
        return {
            "perplexity": perplexity(model, text.held_out),
            "kl": near.kl,
            "top_1": near.top_1,
            "scores": {task: asdict(score) for task, score in scores.items()},
        }

    made = {
        "model": public_name(arguments.model),
        "text": text.fingerprint,
        "tokens": settings.tokens,
        "limit": arguments.limit,
    }
    arguments.work.mkdir(parents=True, exist_ok=True)
    board = Board(arguments.work / "board.json", made, rate, console)
    board.add("dense", dense, cost_of(source.config, dense_shape(source.config)))
    rate_dense_baselines(board, source, text.calibration, load)
    students = recipes()
    costs = {
        name: cost_of(source.config, recipe.shape(source.config.intermediate_size)) for name, recipe in students.items()
    }

    def visit(name: str, model: PreTrainedModel) -> None:
        if name in costs:
            board.add(name, model, costs[name])

    if any(name not in board for name in students):
        compare(
            arguments.model,
            arguments.work / "students",
            students,
            text=arguments.text,
            settings=settings,
            console=console,
            visit=visit,
        )
    publish(board.content, arguments)


def publish(content: dict, arguments: argparse.Namespace) -> None:
    """Table into the page; numbers and plot beside it."""
    folder = arguments.out.parent / "scoreboard"
    folder.mkdir(exist_ok=True)
    write_json(folder / "scoreboard.json", content)
    plot(content["models"], folder / "scoreboard.png")
    limit = f"--limit {arguments.limit} " if arguments.limit else ""
    made = (
        f"`python benchmarks/scoreboard.py --text {Path(arguments.text).name} --tokens {arguments.tokens} "
        f"--held-out-tokens {arguments.held_out_tokens} --data ../shared/eval {limit}--work runs/board "
        f"--out docs/results.md` at commit {commit()}, {content['seconds'] / 60:.0f} minutes: "
        f"{content['made']['model']}, fp32, seed 0.\n\n"
    )
    replace_part(
        arguments.out, "scoreboard", f"{made}{table(content['models'])}\n![Scoreboard](scoreboard/scoreboard.png)\n"
    )


if __name__ == "__main__":
    main()
