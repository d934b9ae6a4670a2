"""The command line: one small function a command."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from factorllm.engines.process import SAFE_PATH
from factorllm.errors import FactorLLMError, one_line

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(markup=False, emoji=False)  # brackets and colons are parts of names

_INTERRUPTED = 130  # by Ctrl-C, as shells have it
_RESUMED = ("factorize", "heal", "sample", "demo")
_WIDE = 200  # columns where nobody looks at a screen: no cell of a table is cut then
_OPTIONS = {"batches": "batch"}  # given several times, and all in one setting
_UsageError = typer.BadParameter.__base__


def _path(text: str) -> Path:
    if not text:
        raise FactorLLMError("a path on the command line is empty; give one, . for the current folder")
    return Path(os.path.expanduser(text))


_IS_PATH = {"parser": _path, "metavar": "PATH"}

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write the checkpoint to.", **_IS_PATH)]
Made = Annotated[Path, typer.Argument(help="A checkpoint that factorllm made.", **_IS_PATH)]
Text = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: .txt, .jsonl, .json, .parquet or a dataset id. Default: sample from the model."
    ),
]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.")]
FileType = Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--resume/--overwrite",
        help="Go on with an unfinished run and refuse an output that exists, or replace what factorllm made there.",
    ),
]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    _: Annotated[bool, typer.Option("--debug", help="Show where a fault of factorllm comes from.")] = False,
) -> None:
    """Turn a dense LLM into a faster sparse Mixture of Experts that every engine already loads."""
    if version:
        typer.echo(f"factorllm {installed_version('factorllm')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def factorize(
    model: Annotated[str, typer.Argument(help="Hub id, folder of safetensors, or .gguf file.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="S2A2E8, S0A4E8N3, 1R4E2K, cmoe, or a .yaml file.")] = "S2A2E8",
    text: Text = None,
    tokens: Tokens = 100_000,
    host: Annotated[str, typer.Option(help="Architecture to write, or auto.")] = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: dtype of the written weights.")
    ] = "auto",
    tune: Annotated[
        int,
        typer.Option(help="Passes over the text that tune each layer by gradient; 0 leaves closed forms only."),
    ] = 0,
    baseline: Annotated[
        bool, typer.Option(help="Also make and measure the static prune with the same active parameters.")
    ] = True,
    memory_limit: Annotated[
        int, typer.Option(help="GiB that one kind of a layer's activations may take before it spills to disk.")
    ] = 2,
    resume: Overwrite = True,
) -> None:
    """Split every FFN of a dense MODEL into experts and write a sparse checkpoint."""
    from factorllm.convert.factorize import factorize as run
    from factorllm.report.terminal import show_summary
    from factorllm.runs.settings import Settings

    settings = Settings(
        tokens=tokens,
        host=host,
        seed=seed,
        device=device,
        dtype=dtype,
        tune=tune,
        baseline=baseline,
        memory_limit=memory_limit << 30,
    )
    summary = run(model, out, recipe, text=text, settings=settings, overwrite=not resume, console=console)
    if summary:
        show_summary(console, summary)


@app.command()
def heal(
    student: Annotated[Path, typer.Argument(help="A checkpoint that factorllm made; a static prune too.", **_IS_PATH)],
    teacher: Annotated[str, typer.Option(help="The dense model that it was made from.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to. Default: STUDENT-healed.", **_IS_PATH)
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to train on, as for factorize.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 200_000,
    epochs: Annotated[int, typer.Option(help="Times that each token is trained on.")] = 1,
    train: Annotated[str, typer.Option(help="What learns: router, experts, ffn, all or lora.")] = "all",
    gates: Annotated[str, typer.Option(help="straight-through keeps gate weights binary; soft frees them.")] = (
        "straight-through"
    ),
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. Default: 1e-4, or 3e-5 where less than 3/8 of the FFN is off."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of teacher and student.")] = 1.0,
    pa_weight: Annotated[float, typer.Option(help="Weight of the Prior-Approximate loss.")] = 0.1,
    balance_weight: Annotated[float, typer.Option(help="Weight of the loss that evens the experts' load.")] = 0.001,
    label_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy of the text itself.")] = 0.0,
    hidden_weight: Annotated[
        float, typer.Option(help="Weight of the distance to the teacher's residual stream.")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Sequences in a step, over all processes.")] = 2,
    micro_batch: Annotated[int, typer.Option(help="Sequences that one process runs at once.")] = 2,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Save memory.")] = False,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16: of matrix products.")] = "auto",
    device: Device = "auto",
    resume: Overwrite = True,
) -> None:
    """Fine-tune a STUDENT toward its dense model, by distillation and the Prior-Approximate loss."""
    from factorllm.healing import HealSettings
    from factorllm.healing import heal as run
    from factorllm.report.terminal import show_healed
    from factorllm.runs.output import located

    settings = HealSettings(
        tokens=tokens,
        epochs=epochs,
        train=train,
        gates=gates,
        learning_rate=learning_rate,
        temperature=temperature,
        pa_weight=pa_weight,
        balance_weight=balance_weight,
        label_weight=label_weight,
        hidden_weight=hidden_weight,
        batch=batch,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        device=device,
    )
    student = located(student)
    out = out or student.parent / f"{student.name}-healed"
    healed = run(student, teacher, out, text=text, settings=settings, overwrite=not resume, console=console)
    if healed:
        show_healed(console, healed)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Hub id, folder of safetensors, or .gguf file.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .jsonl file to write, for --text.", **_IS_PATH)],
    tokens: Annotated[int, typer.Option(help="Tokens to sample.")] = 200_000,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, in which documents follow one another.")] = 256,
    temperature: Annotated[float, typer.Option(help="Below 1: surer of itself and more fluent.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations in the model's chat template, questions and answers.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Overwrite = True,
) -> None:
    """Write text that a dense MODEL says by itself, to calibrate and heal on what it knows."""
    from factorllm.runs.settings import Settings
    from factorllm.text.sample import sample as run

    settings = Settings(tokens=tokens, length=length, seed=seed, device=device)
    path = run(model, out, temperature=temperature, chat=chat, settings=settings, overwrite=not resume, console=console)
    _say(f"written: {path}")


@app.command("eval")
def evaluate(
    checkpoint: Made,
    against: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, separated by commas.")] = (
        "arc_easy,piqa,boolq,copa,lambada_openai"
    ),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of local <task>.jsonl. Default: lm-eval's data from the hub.", **_IS_PATH),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task. Default: all.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to measure perplexity and agreement on.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the numbers as JSON.", **_IS_PATH)] = None,
) -> None:
    """Score a checkpoint on benchmark tasks, and show what it kept of the dense model."""
    from dataclasses import asdict

    from factorllm.measure.scores import evaluate as run
    from factorllm.measure.settings import EvalSettings
    from factorllm.report import SCORES, score_table
    from factorllm.runs.disk import explain_full_disk
    from factorllm.runs.output import check_output, located
    from factorllm.runs.workspace import write_json

    if out:
        out = located(out)
        check_output(out, SCORES, [checkpoint, against, data, text])
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    settings = EvalSettings(tasks=names, data=data, limit=limit, device=device, dtype=dtype)
    found = run(checkpoint, against=against, text=text, settings=settings, console=console)
    console.print(score_table(found))
    if out:
        with explain_full_disk(out, "free some, or choose another -o"):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, asdict(found))


@app.command()
def inspect(
    checkpoint: Made,
    prompt: Annotated[
        str | None, typer.Option(help="Show instead which experts run for each token of this text.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to show for --prompt. Default: the middle one.")] = None,
) -> None:
    """Show what a checkpoint was made from, what it cost, and its layers."""
    from factorllm.measure.routing import route_prompt
    from factorllm.report.terminal import show_provenance, show_routing
    from factorllm.student.read import read_provenance

    made = read_provenance(checkpoint)
    if prompt is None:
        show_provenance(console, checkpoint, made)
    else:
        show_routing(console, route_prompt(checkpoint, prompt, layer))


@app.command()
def report(
    checkpoint: Made,
    against: Annotated[str | None, typer.Option(help="The dense model, for sample generations side by side.")] = None,
    scores: Annotated[Path | None, typer.Option(help="JSON that factorllm eval -o wrote.", **_IS_PATH)] = None,
    speed: Annotated[Path | None, typer.Option(help="speed.json that factorllm bench -o wrote.", **_IS_PATH)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to. Default: CHECKPOINT/report.", **_IS_PATH)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Write one HTML page, and its figures as PNG, on what a conversion cost and gained."""
    _write_report(checkpoint, against, scores, speed, out, device)


@app.command()
def hosts() -> None:
    """Show the architectures that students can be written in, and where each loads."""
    from factorllm.hosts.table import NARROWEST, host_table

    console.width = max(console.width, NARROWEST)
    console.print(host_table(console.width))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A checkpoint that factorllm made, or a dense or pruned model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .gguf file to write.", **_IS_PATH)],
    file_type: FileType = "q8_0",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="GGUF file of the dense model to copy the tokenizer from. Default: build it.", **_IS_PATH),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that run for a token (hosts glm4_moe and qwen2_moe).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a model as one GGUF file for llama.cpp."""
    from factorllm.exporting import export_gguf

    made = export_gguf(model, out, file_type, tokenizer=tokenizer, top_k=top_k, overwrite=overwrite, say=_say)
    console.print(f"written: {made.path} ({made.size / 2**20:.0f} MiB, {file_type})", soft_wrap=True)


@app.command()
def bench(
    student: Annotated[str, typer.Argument(help="A checkpoint that factorllm made.")],
    against: Annotated[list[str], typer.Option(help="The dense model; again for a static prune (recipe S4A0E8 ...).")],
    engine: Annotated[str, typer.Option(help="llamacpp, transformers or vllm.")] = "llamacpp",
    file_type: FileType = "q8_0",
    rounds: Annotated[int, typer.Option(help="Turns of each model.")] = 7,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences that decode at once. Default: 1 and 8.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Thread counts to choose from. Default: powers of two up to all cores.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype for transformers and vLLM.")] = None,
    experts: Annotated[str | None, typer.Option(help="transformers' back end: eager, batched_mm, grouped_mm.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for speed.json and speed.png.", **_IS_PATH)
    ] = None,
) -> None:
    """Time a student, its dense model and its static prune in turns, in one engine."""
    from factorllm.measure.speed import Plan, run_bench

    plan = Plan(
        rounds=rounds, batches=tuple(batch or (1, 8)), threads=tuple(threads or ()), dtype=dtype, experts=experts
    )
    console.print(run_bench(student, against, engine, file_type, plan, out, console))


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint that factorllm made, or a .gguf file.")],
    engine: Annotated[str, typer.Option(help="llamacpp or vllm. Default: vllm where there is a GPU.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    file_type: FileType = "q8_0",
    context: Annotated[int, typer.Option(help="Tokens of a conversation.")] = 4096,
    parallel: Annotated[int, typer.Option(help="Conversations at once (llama.cpp).")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads (llama.cpp).")] = None,
) -> None:
    """Serve a model to OpenAI clients, by the engine's own server."""
    from factorllm.engines.serve import ServeSettings
    from factorllm.engines.serve import serve as run

    settings = ServeSettings(host=host, port=port, context=context, parallel=parallel, threads=threads)
    run(model, engine, file_type, settings, _say)


@app.command()
def demo(
    out: Out = Path("demo-out"),
    tokens: Tokens = 24_576,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Overwrite = True,
) -> None:
    """Factorise the real SmolLM2-135M on Wikipedia introductions and show before and after."""
    from factorllm.convert.factorize import factorize as run
    from factorllm.demo import RECIPE, demo_model, demo_text
    from factorllm.report.terminal import show_summary
    from factorllm.runs.settings import Settings

    settings = Settings(tokens=tokens, held_out_tokens=8192, seed=seed, device=device)
    model, text = demo_model(), demo_text()
    summary = run(model, out, RECIPE, text=text, settings=settings, overwrite=not resume, console=console)
    show_summary(console, summary)
    found = _write_report(out, against=model)
    console.print(f"the student goes on: {found.samples[0].prompt} {found.samples[0].student}", highlight=False)


def _say(message: str) -> None:
    console.print(message, soft_wrap=True, highlight=False)


def _write_report(
    checkpoint: Path,
    against: str | None,
    scores: Path | None = None,
    speed: Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
):
    from factorllm.report.findings import gather
    from factorllm.report.page import check_report_folder, write_report
    from factorllm.runs.output import located

    out = located(out or checkpoint / "report")
    check_report_folder(out)
    found = gather(checkpoint, against, scores, speed, device, console)
    page = write_report(checkpoint.resolve().name, found, out)
    _say(f"report: {page}")
    return found


def main() -> None:
    """Entry point: refusals are one line on stderr and exit code 2; a fault of ours is one too, and exit code 1."""
    if not console.is_terminal:
        console.width = _WIDE
    os.environ |= SAFE_PATH  # lm-eval starts a Python too
    try:
        code = app(standalone_mode=False)
    except (FactorLLMError, ValidationError, _UsageError) as error:
        _end(f"error: {_message(error)}", 2)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _end(
            f"fault: {type(error).__name__}: {one_line(error)}. This is a fault of factorllm, not of your input: "
            f"`factorllm --debug` before the same command shows where; please report what it prints",
            1,
        )
    if code == _INTERRUPTED:
        _end("interrupted; " + _after_interruption(), code)
    raise SystemExit(code)


def _after_interruption() -> str:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command in _RESUMED:
        return "the same command goes on where it stopped"
    return "tasks that were scored are kept" if command == "eval" else "nothing was written"


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        return f"--{_OPTIONS.get(option, option)}: {problem['msg']}"
    return error.format_message() if isinstance(error, _UsageError) else str(error)


def _end(message: str, code: int) -> None:
    shown = " ".join(message.split()).encode(errors="backslashreplace").decode()  # a path may be no UTF-8
    typer.echo(shown, err=True)
    raise SystemExit(code)
