"""What the commands say, and where."""

from __future__ import annotations

from rich.console import Console

WIDE = 200
"""Columns where nobody looks at a screen: no cell of a table is cut then."""

console = Console(markup=False, emoji=False)  # brackets and colons are parts of names


def say(message: str) -> None:
    """One line, however long."""
    console.print(message, soft_wrap=True, highlight=False)
