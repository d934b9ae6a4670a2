"""Where a decoding step's time goes in llama.cpp, by sampling its threads: docs/speed.md. Needs Linux's `perf`.

    python benchmarks/where_time_goes.py dense.gguf student.gguf prune.gguf --out docs/speed.md --mark profile-smollm2

The models take turns. Each sample of each thread is put to what its function does. A thread that waits for the others
at the end of an operation spins, so waiting is seen too.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from common import commit, in_one_line, markdown_table, replace_part

from factorllm.engines import EngineProcess, Options

CONTEXT = 16  # short, for the prompt is sampled too
FREQUENCY = 1999  # samples of each thread in a second

KINDS = {
    "waiting for the other thread": r"libgomp|futex|schedule",
    "matrix products": r"vec_dot_q|mul_mat|gemv|gemm|tinyBLAS|quantize_row",
    "dispatch of operations": r"graph_compute_thread|graph_plan|get_tensor_traits",
    "attention": r"flash_attn|vec_dot_f16|softmax|rope|expf|vec_mad|fp32_to_fp16",
}
"""What a function does, by a pattern of its name and its library; the first that fits."""


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files, the dense one first")
    parser.add_argument("--out", type=Path, required=True, help="Markdown page")
    parser.add_argument("--mark", required=True, help="part of the page")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    found = {model: [] for model in options.models}
    for _ in range(options.rounds):
        for model, rounds in found.items():
            rounds.append(profile(model, options.threads, options.steps))
    kinds = [*KINDS, "all else", "a step"]
    rows = [
        [model.stem, *(f"{median(r[kind] for r in rounds):.2f}" for kind in kinds)] for model, rounds in found.items()
    ]
    command = " ".join(["python benchmarks/where_time_goes.py", *map(str, options.models)])
    made = (
        f"`{command} --out {options.out} --mark {options.mark}` at commit {commit()}: ms of a decoding step at batch "
        f"1, {options.threads} threads, mean over the threads, medians of {options.rounds} rounds in turns.\n\n"
    )
    replace_part(options.out, options.mark, made + markdown_table(["model", *kinds], rows))


def profile(model: Path, threads: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decoding step by kind of work, mean over the threads, and of all of it."""
    loaded = Options(context=CONTEXT + steps + 8, decode_threads=threads, prefill_threads=threads)
    with EngineProcess("llamacpp", model, loaded) as engine, tempfile.TemporaryDirectory() as folder:
        engine.decode(1, CONTEXT, steps)  # warms up
        data = Path(folder) / "perf.data"
        words = ["perf", "record", "-e", "cpu-clock", "-F", str(FREQUENCY), "-p", str(engine.pid), "-o", str(data)]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as recorder:
            time.sleep(0.5)  # until it is attached
            seconds = engine.decode(1, CONTEXT, steps)
            recorder.send_signal(signal.SIGINT)
        counts = Counter(map(kind_of, samples(data)))
    share = {kind: counts[kind] / counts.total() for kind in [*KINDS, "all else"]}
    return {kind: 1000 * seconds * part for kind, part in share.items()} | {"a step": 1000 * seconds}


def samples(data: Path) -> list[str]:
    """Function and library of each sample."""
    words = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def kind_of(sample: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, sample)), "all else")


if __name__ == "__main__":
    main()
