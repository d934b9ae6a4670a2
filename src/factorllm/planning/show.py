"""The table of `factorllm plan`."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from factorllm.planning.outlook import HEALED_TOKENS, TOKENS, Outlook
from factorllm.runs.progress import minutes


def outlook_table(outlook: Outlook) -> Table:
    """A row a shape and file type: expected speed, size and memory, time to make, and what is known of its quality."""
    fewer = outlook.vocabulary
    kept = "" if fewer is None else f"; all but dense with {fewer:,} tokens of its vocabulary"
    table = Table(
        title=f"{outlook.model} in llama.cpp on this machine, as expected",
        caption=f"minutes: converting from {TOKENS:,} tokens, and healing on {HEALED_TOKENS:,}; "
        f"x: over the dense model in the same type{kept}",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    names = ("type", "FFN off", "decode, tokens/s", "x", "prefill x", "MiB", "memory, MiB", "minutes")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="left" if name == "type" else "right")
    table.add_column("quality, where it was measured", overflow="fold")
    before = None
    for choice in outlook.choices:
        expected = choice.expected
        if before not in (None, expected.file_type):
            table.add_section()
        before = expected.file_type
        made = expected.recipe is not None
        table.add_row(
            f"{expected.name}, {expected.kind}" if made else expected.name,
            expected.file_type,
            f"{expected.sparsity:.0%}",
            f"{expected.decode:.1f}",
            f"{expected.decode_ratio:.2f}",
            f"{expected.prefill_ratio:.2f}",
            f"{expected.file_bytes / 2**20:.0f}",
            f"{expected.memory_bytes / 2**20:.0f}",
            f"{minutes(choice.convert_seconds)} + {minutes(choice.heal_seconds)}" if made else "",
            str(choice.quality or "not measured") if made else "",
        )
    return table
