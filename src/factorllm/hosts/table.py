"""The tables of `factorllm hosts`."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.dense.families import FAMILIES
from factorllm.hosts import HOSTS, MoeHost

NARROWEST = 80
"""Columns that the tables need at least: with fewer, words would be cut off."""

_WIDEST = 132
_NARROW = {"models": 22, "experts in": 28, "engines": len("transformers,"), "gate weights": len("selected")}
_HOSTS = [host for host in HOSTS.values() if isinstance(host, MoeHost)]


def family_table(columns: int) -> Table:
    """One row a dense family: its models, and the hosts that hold it exactly.

    Args:
        columns: of the terminal.
    """
    table = _table(columns, "dense family", "models", "experts in")
    for name, family in FAMILIES.items():
        holding = [host.name for host in _HOSTS if name in host.families]
        table.add_row(name, family.models, ", ".join(holding) or "none: static prune only")
    return table


def host_table(columns: int) -> Table:
    """One row a host: its engines, and how its gates are made.

    Args:
        columns: of the terminal.
    """
    table = _table(columns, "host", "shared", "engines", "gate weights", "down x", "top-k")
    for host in _HOSTS:
        table.add_row(
            host.name,
            host.shared,
            ", ".join(host.all_engines),
            host.gates.rule,
            host.gates.scale_rule,
            "free" if host.gates.top_k_is_free else "fixed",
        )
    return table


def _table(columns: int, *names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, width=_NARROW.get(name) if columns < _WIDEST else None)
    return table
