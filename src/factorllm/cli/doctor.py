"""`factorllm doctor`"""

from __future__ import annotations

from factorllm.cli import terminal


def doctor() -> None:
    """Show versions, the machine and the engines found: what a report of a fault needs."""
    from factorllm.doctor import findings

    for name, value in findings().items():
        terminal.say(f"{name}: {value}")
