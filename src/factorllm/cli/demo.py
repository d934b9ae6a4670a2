"""`factorllm demo`"""

from __future__ import annotations

from pathlib import Path

from factorllm.cli import terminal
from factorllm.cli.make import show_made
from factorllm.cli.options import Out


def demo(out: Out = Path("demo-out")) -> None:
    """Make the real SmolLM2-135M sparse on Wikipedia introductions, the quick way, and show before and after."""
    from factorllm.demo import demo_model, demo_text
    from factorllm.making.run import make
    from factorllm.report.summary import read_summary
    from factorllm.report.terminal import show_summary
    from factorllm.runs.output import MADE
    from factorllm.student.read import read_provenance

    made = make(demo_model(), out, text=demo_text(), effort="quick", console=terminal.console)
    checkpoint = made.out / MADE
    show_summary(terminal.console, read_summary(checkpoint, read_provenance(checkpoint)))
    show_made(made)
