"""Every method at 25, 50 and 75 % FFN sparsity, on one model and one text, with the benchmark tasks: docs/results.md.

    python benchmarks/scoreboard.py --text mixed.jsonl --data ../shared/eval --work runs/board --out docs/results.md

All methods have the same calibration tokens and, at one sparsity, the same active FFN neurons (the depth prune: as many
parameters as whole layers allow). Those that split or keep neurons share one restore; FLAP has its own, a bias; a depth
prune has none. A killed run goes on where it was. Numbers of each task are in scoreboard.json beside the plot.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from common import commit, in_one_line, markdown_table, replace_part
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from factorllm import Recipe, parse_recipe
from factorllm.baselines import block_influence, depth_prune, flap_prune, layers_to_drop
from factorllm.baselines.depth import shortened_cost
from factorllm.convert.factorize import compare
from factorllm.demo import demo_model
from factorllm.dense import ModelSource, open_model
from factorllm.measure.agreement import on_text
from factorllm.measure.cost import Cost, cost_of, dense_shape
from factorllm.measure.perplexity import perplexity
from factorllm.measure.tasks import Score, check_tasks, retention, run_task
from factorllm.report import ModelRow
from factorllm.runs.progress import Clock
from factorllm.runs.settings import Settings
from factorllm.runs.workspace import write_json
from factorllm.text import CalibrationText, read_calibration_text
from factorllm.text.calibration import public_name

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
    "factorllm-paper": "FactorLLM paper, 1R4E*k*K",
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


@dataclass(frozen=True)
class Ground:
    """What all methods share: the dense model, its text, and the questions.

    Attributes:
        questions: of each task; None for all.
    """

    source: ModelSource
    settings: Settings
    text: CalibrationText
    data: Path
    questions: int | None

    def load(self) -> PreTrainedModel:
        """The dense model, new each time."""
        return self.source.load_model(self.settings.compute_dtype, self.settings.torch_device)

    def decides(self) -> dict:
        """What the numbers depend on, beside the code."""
        return {
            "model": public_name(self.source.label),
            "text": self.text.fingerprint,
            "calibration_tokens": self.text.calibration.numel(),
            "questions": self.questions,
        }


class Board:
    """What was measured so far, kept on disk."""

    def __init__(self, path: Path, ground: Ground, console: Console):
        self.path, self.ground, self._console, self._clock = path, ground, console, Clock()
        made = ground.decides()
        self.content = json.loads(path.read_text()) if path.exists() else {"made": made, "seconds": 0.0, "models": {}}
        if self.content["made"] != made:
            raise SystemExit(f"{path} was measured with other arguments; remove it or choose another --work")
        self._dense, self._tokenizer = ground.load(), ground.source.tokenizer()

    def __contains__(self, name: str) -> bool:
        return name in self.content["models"]

    def add(self, row: ModelRow, model: PreTrainedModel) -> None:
        """Measure a model that is not on the board yet."""
        if row.name in self:
            return
        self.content["models"][row.name] = row.as_dict() | self._rate(model)
        self.content["seconds"] += (seconds := self._clock.lap())
        write_json(self.path, self.content)
        self._console.print(f"{row.name}: perplexity {row.perplexity:.2f} ({seconds:.0f} s)")

    def _rate(self, model: PreTrainedModel) -> dict:
        ground = self.ground
        scores = {task: run_task(model, self._tokenizer, task, ground.data, ground.questions) for task in TASKS}
        _, near = on_text(self._dense, model, ground.text.held_out)
        return asdict(near) | {"scores": {task: asdict(score) for task, score in scores.items()}}


def add_dense(board: Board) -> None:
    """The dense model, and FLAP and the depth prune, which change it."""
    ground, config = board.ground, board.ground.source.config
    held_out, calibration = ground.text.held_out, ground.text.calibration
    influence = cache(lambda: block_influence(ground.load(), calibration))  # the same at each sparsity

    def add(name: str, model: PreTrainedModel, cost: Cost) -> None:
        board.add(ModelRow(name, perplexity(model, held_out), cost), model)

    if "dense" not in board:
        add("dense", ground.load(), cost_of(config, dense_shape(config)))
    for percent, active in ACTIVE_PARTS.items():
        shape = Recipe(shared=active, active=0, parts=8).shape(config.intermediate_size)
        if (name := f"flap-{percent}") not in board:
            flap_prune(model := ground.load(), calibration, shape.shared_width)
            add(name, model, cost_of(config, shape))
        if (name := f"depth-{percent}") not in board:
            count = layers_to_drop(config, cost_of(config, shape).active_parameters)
            depth_prune(model := ground.load(), influence(), count)
            add(name, model, shortened_cost(config, count))


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
    scores = found["scores"].values()
    mean = sum(score["value"] for score in scores) / len(scores)
    error = sum(score["error"] ** 2 for score in scores) ** 0.5 / len(scores)
    retained = ("-" if share is None else f"{share:.1%}" for share in kept(found, dense))
    return [
        title,
        f"{found['active_parameters'] / 1e6:.1f} M",
        f"{found['perplexity']:,.1f}",
        f"{found['perplexity'] / dense['perplexity']:,.2f}",
        f"{found['kl']:.3f}",
        f"{found['top_1']:.1%}",
        f"{mean:.1%} ± {error:.1%}",
        *retained,
    ]


def kept(found: dict, dense: dict) -> tuple[float | None, float | None]:
    """Retention over all tasks, plain and above chance."""
    return retention(*({task: Score(**score) for task, score in one["scores"].items()} for one in (found, dense)))


def plot(models: dict[str, dict], path: Path) -> None:
    """Perplexity and retention against active parameters, a line a method."""
    dense = models["dense"]
    panels = {
        "perplexity, x dense": lambda found: found["perplexity"] / dense["perplexity"],
        "five tasks, above-chance retention": lambda found: kept(found, dense)[1],
    }
    figure = Figure(figsize=(11, 4.5))
    axes = figure.subplots(1, 2)
    for axis, (label, value) in zip(axes, panels.items(), strict=True):
        for method, title in METHODS.items():
            points = [dense, *(models[f"{method}-{percent}"] for percent in ACTIVE_PARTS)]
            active = [point["active_parameters"] / 1e6 for point in points]
            line = {"marker": "o", "linewidth": 2.5 if method == "ours" else 1, "label": title.replace("*", "")}
            axis.plot(active, [value(point) for point in points], **line)
        axis.set_xlabel("active parameters, M")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@in_one_line
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
    arguments.work.mkdir(parents=True, exist_ok=True)
    board = Board(arguments.work / "board.json", open_ground(arguments), console)
    add_dense(board)
    students, settings = recipes(), board.ground.settings
    if any(name not in board for name in students):
        work = arguments.work / "students"
        compare(
            arguments.model, work, students, text=arguments.text, settings=settings, console=console, visit=board.add
        )
    publish(board.content, arguments)


def open_ground(arguments: argparse.Namespace) -> Ground:
    source = open_model(arguments.model)
    settings = Settings(tokens=arguments.tokens, held_out_tokens=arguments.held_out_tokens).resolve(source.config)
    text = read_calibration_text(arguments.text, source.tokenizer(), settings)
    return Ground(source, settings, text, arguments.data, arguments.limit)


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
