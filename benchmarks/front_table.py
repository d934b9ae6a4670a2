"""Write the table of a front into a page of docs/, or into the README.

    factorllm front STUDENT --against DENSE --against PRUNED --text TEXT -o runs/front
    python benchmarks/front_table.py runs/front/front.json --out docs/results.md --mark front-qwen

With `--types q8_0 iq4_nl` only the rows of these types.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import in_one_line, markdown_table, replace_part

from factorllm.measure.front.show import front_head, front_row, read_front


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("front", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mark", required=True)
    parser.add_argument("--types", nargs="*")
    options = parser.parse_args()
    front = read_front(options.front)
    rows = [front_row(front, point) for point in front.points if point.file_type in (options.types or front.plan.types)]
    replace_part(options.out, options.mark, markdown_table(front_head(front), rows))


if __name__ == "__main__":
    main()
