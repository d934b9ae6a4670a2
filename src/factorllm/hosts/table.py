"""The table of `factorllm hosts`."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.hosts import HOSTS, MoeHost


def host_table() -> Table:
    """One row a host: the families that it holds exactly, its engines, and how its gates are made."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("host", "dense families", "shared", "engines", "gate weights", "down x", "top-k"):
        table.add_column(column, min_width=12 if column == "engines" else 5, no_wrap=column == "host")
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
