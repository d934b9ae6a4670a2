"""`factorllm report`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorllm.cli import terminal
from factorllm.cli.options import IS_PATH, Made


def report(
    checkpoint: Made,
    against: Annotated[str | None, typer.Option(help="The dense model, for sample generations side by side.")] = None,
    scores: Annotated[Path | None, typer.Option(help="JSON that factorllm eval -o wrote.", **IS_PATH)] = None,
    speed: Annotated[Path | None, typer.Option(help="speed.json that factorllm bench -o wrote.", **IS_PATH)] = None,
    front: Annotated[Path | None, typer.Option(help="front.json that factorllm front -o wrote.", **IS_PATH)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write to. Default: CHECKPOINT/report.", **IS_PATH)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Write one HTML page, and its figures as PNG, on what a conversion cost and gained."""
    from factorllm.report import page
    from factorllm.report.findings import gather
    from factorllm.report.measured import read_measured
    from factorllm.runs.output import located

    out = located(out or checkpoint / "report")
    page.check_report_folder(out)
    found = gather(checkpoint, against, read_measured(scores, speed, front), device, terminal.console)
    terminal.say(f"report: {page.write_report(checkpoint.resolve().name, found, out)}")
