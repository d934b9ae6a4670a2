"""`factorllm hosts`"""

from __future__ import annotations

from factorllm.cli import terminal


def hosts() -> None:
    """Show the architectures that students can be written in, and where each loads."""
    from factorllm.hosts.table import NARROWEST, host_table

    console = terminal.console
    console.width = max(console.width, NARROWEST)
    console.print(host_table(console.width))
