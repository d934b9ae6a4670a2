"""The command line: one small function a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from factorllm.errors import FactorLLMError

app = typer.Typer(
    help="Turn a dense LLM into a faster sparse Mixture of Experts that every engine already loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write the checkpoint to.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: .txt, .jsonl, .json, .parquet or a dataset id. Default: sample from the model."
    ),
]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--resume/--overwrite",
        help="Go on with an unfinished run and refuse an output that exists, or replace it at the end.",
    ),
]


@app.command()
def factorize(
    model: Annotated[str, typer.Argument(help="Hub id, folder of safetensors, or .gguf file.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="S2A2E8, 1R4E2K, or a .yaml file.")] = "S2A2E8",
    text: Text = None,
    tokens: Tokens = 100_000,
    host: Annotated[str, typer.Option(help="Architecture to write, or auto.")] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: dtype of the written weights.")
    ] = "auto",
    baseline: Annotated[
        bool, typer.Option(help="Also make and measure the static prune with the same active parameters.")
    ] = True,
    resume: Overwrite = True,
) -> None:
    """Split every FFN of a dense MODEL into experts and write a sparse checkpoint."""
    from factorllm.pipeline import factorize as run
    from factorllm.settings import Settings

    settings = Settings(tokens=tokens, host=host, seed=seed, device=device, dtype=dtype, baseline=baseline)
    _show(run(model, out, recipe, text=text, settings=settings, overwrite=not resume, console=console))


@app.command()
def inspect(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that factorllm made.")]) -> None:
    """Show what a checkpoint was made from, what it cost, and its layers."""
    from factorllm.inspection import read_provenance
    from factorllm.report import layer_table, result_table

    made = read_provenance(checkpoint)
    data, recipe = made["data"], made["recipe"]
    console.print(
        f"{checkpoint}: {made['base_model']['name']} as {made['host']}, loads in {', '.join(made['engines'])}"
    )
    console.print("recipe: " + ", ".join(f"{key} {value}" for key, value in recipe.items()), soft_wrap=True)
    console.print(f"text: {data['origin']}, {data['calibration_tokens']:,} calibration tokens")
    console.print(result_table(made["results"], f"perplexity on {data['held_out_tokens']:,} held-out tokens"))
    console.print(layer_table(made["layers"]))


@app.command()
def demo(
    out: Out = Path("demo-out"),
    tokens: Tokens = 24_576,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Overwrite = True,
) -> None:
    """Factorise the real SmolLM2-135M on Wikipedia introductions and show before and after."""
    from factorllm.demo import PROMPT, RECIPE, demo_model, demo_text
    from factorllm.evaluate import complete
    from factorllm.pipeline import factorize as run
    from factorllm.settings import Settings

    settings = Settings(tokens=tokens, held_out_tokens=8192, seed=seed, device=device)
    _show(run(demo_model(), out, RECIPE, text=demo_text(), settings=settings, overwrite=not resume, console=console))
    console.print(f"the student goes on: {complete(out, PROMPT)}", highlight=False)


def _show(summary) -> None:
    from factorllm.report import result_table

    results = {row.name: row.as_dict() for row in summary.rows}
    console.print(
        result_table(results, f"perplexity on {summary.held_out_tokens:,} held-out tokens: {summary.text_origin}")
    )
    spent = summary.spent
    console.print(
        f"{summary.recipe.name} from {summary.calibration_tokens:,} calibration tokens: converted in "
        f"{spent.conversion_seconds:.0f} s (static prune: {spent.baseline_seconds:.0f} s more), "
        f"peak memory {spent.peak_memory_bytes / 2**30:.1f} GiB",
        soft_wrap=True,
    )
    console.print(f"written: {summary.out} ({summary.host}; loads in {', '.join(summary.engines)})", soft_wrap=True)


def main() -> None:
    """Entry point: refusals are one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except FactorLLMError as error:
        _refuse(str(error))
    except ValidationError as error:
        problem = error.errors()[0]
        _refuse(f"--{problem['loc'][0]}: {problem['msg']}")
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on where it stopped", err=True)
        raise SystemExit(130) from None


def _refuse(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise SystemExit(2)
