"""`factorllm demo`"""

from __future__ import annotations

from pathlib import Path

from factorllm.cli import terminal
from factorllm.cli.options import Out, Resume, settings_from
from factorllm.cli.report import write_report
from factorllm.runs.settings import Settings


@settings_from(Settings, "tokens", "seed", "device", tokens=24_576)
def demo(out: Out = Path("demo-out"), resume: Resume = True, **chosen) -> None:
    """Factorise the real SmolLM2-135M on Wikipedia introductions and show before and after."""
    from factorllm.convert.factorize import factorize as run
    from factorllm.demo import RECIPE, demo_model, demo_text
    from factorllm.report.terminal import show_summary

    console = terminal.console
    settings = Settings(**chosen, held_out_tokens=8192)
    model, text = demo_model(), demo_text()
    summary = run(model, out, RECIPE, text=text, settings=settings, overwrite=not resume, console=console)
    show_summary(console, summary)
    found = write_report(out, against=model)
    console.print(f"the student goes on: {found.samples[0].prompt} {found.samples[0].student}", highlight=False)
