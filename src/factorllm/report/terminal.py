"""What the commands print of a conversion, a healing and a checkpoint."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from factorllm.measure.routing import RoutedPrompt
from factorllm.report.summary import Summary, kind_rows, kind_table, layer_table, measured_on, result_table
from factorllm.report.tokens import coloured_tokens, legend


def show_summary(console: Console, summary: Summary) -> None:
    """The table of a conversion and what it took."""
    results = {row.name: row.as_dict() for row in summary.rows}
    console.print(
        result_table(results, f"perplexity on {summary.held_out_tokens:,} held-out tokens: {summary.text_origin}")
    )
    spent, tokens = summary.spent, summary.calibration_tokens
    if summary.images:
        console.print(kind_table(summary.images, summary.layers))
        tokens = sum(row.calibration_tokens for row in kind_rows(summary.images, summary.layers))
    console.print(
        f"{summary.recipe.name} from {tokens:,} calibration tokens: converted in "
        f"{spent.conversion_seconds:.0f} s (static prune: {spent.baseline_seconds:.0f} s more), "
        f"peak memory {spent.peak_memory_bytes / 2**30:.1f} GiB",
        soft_wrap=True,
    )
    written = "done already" if summary.done_already else "written"
    console.print(f"{written}: {summary.out} ({summary.host}; loads in {', '.join(summary.engines)})", soft_wrap=True)


def show_healed(console: Console, healed) -> None:
    """The table of a healing (`heal.Healed`)."""
    title = f"perplexity on {healed.held_out_tokens:,} held-out tokens: {healed.text_origin}"
    console.print(result_table(healed.results, title))
    if healed.outcome:
        console.print(healed.outcome, soft_wrap=True)
    written = "done already" if healed.seconds is None else f"in {healed.seconds:.0f} s; written"
    console.print(f"healed on {healed.tokens:,} tokens, {written}: {healed.out}", soft_wrap=True)


def show_provenance(console: Console, checkpoint: Path, made: dict) -> None:
    """What a checkpoint says of itself in `factorllm.json`."""
    data, recipe = made["data"], made["recipe"]
    console.print(
        f"{checkpoint}: {made['base_model']['name']} as {made['host']}, loads in {', '.join(made['engines'])}"
    )
    console.print("recipe: " + ", ".join(f"{key} {value}" for key, value in recipe.items()), soft_wrap=True)
    console.print(f"text: {data['origin']}, {data['calibration_tokens']:,} calibration tokens")
    tokens, text = measured_on(made)
    console.print(result_table(made["results"], f"perplexity on {tokens:,} held-out tokens: {text}"))
    if data.get("images"):
        console.print(kind_table(data["images"], made["layers"]))
    console.print(layer_table(made["layers"]))


def show_routing(console: Console, routed: RoutedPrompt) -> None:
    """A prompt with the experts that ran for it; their numbers where there are no colours."""
    in_colour = console.is_terminal and not console.no_color
    console.print(coloured_tokens(routed, in_colour), soft_wrap=True)
    console.print(legend(routed, in_colour), soft_wrap=True)
