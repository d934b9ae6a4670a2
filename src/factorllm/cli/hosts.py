"""`factorllm hosts`"""

from __future__ import annotations

from factorllm.cli import terminal


def hosts() -> None:
    """Show the dense families that are read, the architectures that students are written in, and where each loads."""
    from factorllm.hosts.table import NARROWEST, family_table, host_table

    console = terminal.console
    console.width = max(console.width, NARROWEST)
    console.print(family_table(console.width))
    console.print()
    console.print(host_table(console.width))
