"""Students, prunes and quantised files that draft for a dense model: the table of docs/serving.md.

    python benchmarks/lossless.py time dense.gguf draft.gguf --text TEXT --results lossless.jsonl
    python benchmarks/lossless.py same dense.gguf draft.gguf --text TEXT --results lossless.jsonl --prompts 200
    python benchmarks/lossless.py table --results lossless.jsonl --out docs/serving.md --mark lossless

`time`: what `serve --lossless` forecasts and decides, and the speed with drafts in turns with the dense model alone, on
prompts that it has not seen: as decided and, where that is off, with drafts of one token. `same`: greedy texts with
drafts, whatever they cost, beside those of the dense model alone; where one differs, how far apart the two tokens are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

from common import commit, in_one_line, markdown_table, replace_part

from factorllm.engines.base import Options
from factorllm.engines.llamacpp import open_server
from factorllm.engines.llamacpp_client import post
from factorllm.serving import lossless
from factorllm.serving.lossless import Drafting, decide, lossless_params
from factorllm.text.documents import Documents

BEGINNING = 120  # characters of a document that a prompt has


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "same", "table"])
    parser.add_argument("models", type=Path, nargs="*", help="GGUF files: the dense one, and what drafts")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--text", help="whose documents' beginnings are the prompts")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="document that the first prompt is of")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="CPU time at one thread, where the machine is not quiet")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mark", default="lossless")
    options = parser.parse_args()
    if options.what == "table":
        replace_part(options.out, options.mark, table(options.results))
        return
    dense, student = options.models
    wanted = itertools.islice(Documents(options.text), options.first, options.first + options.prompts)
    prompts = [each[:BEGINNING] for each in wanted]
    if options.cpu:
        options.threads, lossless.timings = 1, cpu_timings
    run = timed if options.what == "time" else same
    found = run(dense, student, prompts, options.tokens, options.threads)
    found |= {"what": options.what, "dense": dense.stem, "draft": student.stem, "commit": commit()}
    with options.results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(found)


def timed(dense: Path, student: Path, prompts: list[str], tokens: int, threads: int | None) -> dict:
    """What is decided, and the speed over the dense model alone on prompts in turns."""
    said: list[str] = []
    decided = decide(dense, student, threads, said.append)
    drafting = decided or Drafting(student, 1)
    alone, drafts = servers(dense, [None, drafting], threads)
    addresses = [each.listening_address for each in (alone, drafts)]
    pairs = [[lossless.timings(address, prompt, tokens) for address in addresses] for prompt in prompts]
    first, second = (sum(timings[i]["predicted_ms"] for timings in pairs) for i in range(2))
    taken, drafted = (sum(each[1].get(key, 0) for each in pairs) for key in ("draft_n_accepted", "draft_n"))
    return {
        "said": said,
        "on": decided is not None,
        "longest": drafting.longest,
        "sure": drafting.sure,
        "speed_up": first / second,
        "accepted": taken / max(drafted, 1),
    }


def cpu_timings(address: str, text: str, tokens: int = 48) -> dict:
    """As llama.cpp's timings, with the CPU time that this process, and so the server in it, took for the answer."""
    asked = {"prompt": text, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    post(address, "/completion", asked | {"n_predict": 1})
    start = time.process_time()
    found = post(address, "/completion", asked | {"n_predict": tokens})["timings"]
    return found | {"predicted_ms": 1000 * (time.process_time() - start)}


def same(dense: Path, student: Path, prompts: list[str], tokens: int, threads: int | None) -> dict:
    """How many texts are the same with drafts of up to four tokens; of the others, the margin where they part."""
    alone, drafts = servers(dense, [None, Drafting(student, 4, 0.5)], threads)
    margins = []
    for done, prompt in enumerate(prompts, 1):
        one, two = (ask(server, prompt, tokens)["tokens"] for server in (alone, drafts))
        margins += [] if one == two else [margin(alone, prompt, one, two)]
        print(f"{done} prompts: {margins}", flush=True)
    return {"prompts": len(prompts), "tokens": tokens, "margins": margins}


def margin(server, prompt: str, one: list[int], two: list[int]) -> float:
    """Difference of the log-probabilities of the two tokens at which two texts part."""
    place = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    asked = {"content": prompt, "add_special": True}
    read = post(server.listening_address, "/tokenize", asked)["tokens"] + one[:place]
    top = ask(server, read, 1, n_probs=20)["completion_probabilities"][0]["top_logprobs"]
    said = {item["id"]: item["logprob"] for item in top}
    return abs(said[one[place]] - said.get(two[place], float("-inf")))


def servers(dense: Path, draftings: list[Drafting | None], threads: int | None) -> list:
    options = Options(context=512, decode_threads=threads)
    return [open_server(lossless_params(dense, options, each), f"load {dense}") for each in draftings]


def ask(server, prompt: str | list[int], count: int, **more) -> dict:
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return post(server.listening_address, "/completion", asked | {"return_tokens": True} | more)


def table(results: Path) -> str:
    """One row for each pair: the last that was timed, and all texts."""
    made = "`python benchmarks/lossless.py time DENSE.gguf DRAFT.gguf --cpu`, and `same`, for each pair.\n\n"
    pairs: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for found in map(json.loads, results.read_text().splitlines()):
        pair = pairs.setdefault((found["dense"], found["draft"]), {"time": [], "same": []})
        pair[found["what"]].append(found)
    rows = [
        [dense, draft, *time_cells(found["time"]), *same_cells(found["same"])]
        for (dense, draft), found in pairs.items()
    ]
    head = ["dense model", "draft", "forecast", "served", "drafts", "measured with them", "accepted", "same text"]
    return made + markdown_table([*head, "margins where not"], rows)


def time_cells(runs: list[dict]) -> list[str]:
    if not runs:
        return [""] * 5
    found = runs[-1]
    forecast = found["said"][0].split()[1]
    drafts = f"up to {found['longest']}, {found['sure']:.0%} sure"
    served = "with drafts" if found["on"] else "without"
    return [f"{forecast} x", served, drafts, f"{found['speed_up']:.2f} x", f"{found['accepted']:.0%}"]


def same_cells(runs: list[dict]) -> list[str]:
    if not runs:
        return ["", ""]
    prompts = sum(run["prompts"] for run in runs)
    margins = sorted(margin for run in runs for margin in run["margins"])
    return [f"{prompts - len(margins)} of {prompts}", ", ".join(f"{each:.1e}" for each in margins)]


if __name__ == "__main__":
    main()
