"""The table of `factorllm hosts`."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.hosts import HOSTS, MoeHost

NARROWEST = 80
"""Columns that the table needs at least: with fewer, words would be cut off."""

_WIDEST = 132
_NARROW = {"dense families": len("families"), "engines": len("transformers,"), "gate weights": len("selected")}


def host_table(columns: int) -> Table:
    """One row a host: the families that it holds exactly, its engines, and how its gates are made.

    Args:
        columns: of the terminal.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("host", "dense families", "shared", "engines", "gate weights", "down x", "top-k"):
        table.add_column(column, width=_NARROW.get(column) if columns < _WIDEST else None)
    for host in HOSTS.values():
        if isinstance(host, MoeHost):
            table.add_row(
                host.name,
                ", ".join(host.families),
                host.shared,
                ", ".join(host.all_engines),
                host.gates.rule,
                host.gates.scale_rule,
                "free" if host.gates.top_k_is_free else "fixed",
            )
    return table
