"""Read-ME against one general prune: quality on unseen documents of known kinds, and the queue on a mixed load.

    factorllm factorize DENSE --recipe read-me:K4 --text all.jsonl -o runs/read-me
    factorllm prune DENSE --keep 0.5 --text all.jsonl -o runs/general
    python benchmarks/read_me.py quality DENSE runs/read-me runs/general wiki.jsonl code.jsonl manuals.jsonl chat.jsonl
    python benchmarks/read_me.py queue wiki.gguf python.gguf manuals.gguf chat.gguf
    python benchmarks/read_me.py simulate

`quality`: KL(dense || model) on what follows a prompt of each document, for the general prune, the kind that the prompt
chooses, and the kind that is best for that document (the oracle). `queue`: 64 requests that come at random, through the
real server with 2 of 4 models in memory, by each policy; `simulate` asks the schedule alone, over many draws.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from common import in_one_line

from factorllm.serving.schedule import Load, Schedule, Start
from factorllm.serving.settings import ServeSettings

PROMPT, SCORED, DOCUMENTS = 128, 128, 12
REQUESTS, KINDS, IN_MEMORY, PARALLEL, LIMIT = 64, 4, 2, 4, 30.0
POLICIES = ("fifo", "lru", "belady")


def quality(dense: str, made: str, general: str, texts: list[str]) -> None:
    import torch
    from common import document_starts

    from factorllm.dense import open_model
    from factorllm.student.read import load_student
    from factorllm.text.intuition import Intuition

    source, intuition = open_model(dense), Intuition.load(Path(made))
    tokenizer, rows, owner = source.tokenizer(), [], []
    for kind, text in enumerate(texts):
        found = document_starts(tokenizer, text, DOCUMENTS, PROMPT + SCORED, PROMPT + SCORED)
        rows += found
        owner += [kind] * len(found)
    tokens, owner = torch.tensor(rows), np.array(owner)

    @torch.inference_mode()
    def logs(model) -> Iterator[torch.Tensor]:
        for row in tokens:
            yield model(row[None], use_cache=False).logits[0, PROMPT - 1 : -1].float().log_softmax(-1)

    wanted = [log.half() for log in logs(source.load_model(torch.float32, torch.device("cpu")))]

    def divergence(folder: Path) -> np.ndarray:
        pairs = zip(wanted, logs(load_student(folder)), strict=True)
        return np.array([(p.float().exp() * (p.float() - q)).sum(-1).mean().item() for p, q in pairs])

    base = divergence(Path(general))
    each = np.stack([divergence(Path(made) / "kinds" / str(kind)) for kind in range(intuition.kinds)], axis=1)
    prompts = [tokenizer.decode(row[:PROMPT], skip_special_tokens=True) for row in tokens.tolist()]
    chosen = np.array([int(intuition.probabilities(prompt).argmax()) for prompt in prompts])
    routed, oracle = each[np.arange(len(each)), chosen], each.min(axis=1)
    print("text | documents | general | chosen | oracle | chosen kinds")
    for kind, text in enumerate(texts):
        of = owner == kind
        kinds = np.bincount(chosen[of], minlength=intuition.kinds)
        means = " | ".join(f"{values[of].mean():.3f}" for values in (base, routed, oracle))
        print(f"{Path(text).stem} | {of.sum()} | {means} | {kinds}")
    general_kl, routed_kl, oracle_kl = (
        np.mean([values[owner == kind].mean() for kind in range(len(texts))]) for values in (base, routed, oracle)
    )
    lost = (routed_kl - oracle_kl) / (general_kl - oracle_kl)
    print(f"mean KL: {general_kl:.3f} general, {routed_kl:.3f} chosen ({routed_kl / general_kl:.3f} x), ", end="")
    print(f"{oracle_kl:.3f} oracle; the choice loses {lost:.0%} of the oracle's gain")


def load(seed: int, pace: float) -> list[tuple[float, int]]:
    """Requests at random times, a mean of `pace` seconds apart, of kinds at random."""
    chooser, now, found = random.Random(seed), 0.0, []
    for _ in range(REQUESTS):
        now += chooser.expovariate(1 / pace)
        found.append((now, chooser.randrange(KINDS)))
    return found


def simulated(
    arrivals: list[tuple[float, int]], policy: str, limit: float, run: float, loading: float, parallel: int = PARALLEL
) -> tuple[float, float, float]:
    """Share of hits, 95th percentile of the time until an answer, and the longest wait."""
    schedule, order = Schedule(KINDS, IN_MEMORY, parallel, limit, policy), itertools.count()
    events = [(at, next(order), "arrive", number) for number, (at, _) in enumerate(arrivals)]
    ended: dict[int, float] = {}
    while events:
        now, _, what, which = heapq.heappop(events)
        if what == "arrive":
            schedule.arrive(which, arrivals[which][1], now)
        elif what == "loaded":
            schedule.loaded(which)
        else:
            ended[which] = now - arrivals[which][0]
            schedule.finished(which)
        for action in schedule.act(now):
            if isinstance(action, Start):
                heapq.heappush(events, (now + run, next(order), "finished", action.request))
            elif isinstance(action, Load):
                heapq.heappush(events, (now + loading, next(order), "loaded", action.kind))
    return schedule.hits / REQUESTS, float(np.percentile(list(ended.values()), 95)), max(schedule.waits)


def simulate(parallel: int) -> None:
    """Also with a limit of which nearly all requests wait half."""
    cases = {policy: (policy, LIMIT) for policy in POLICIES} | {"belady, 12 s": ("belady", 12.0)}
    print("answer s | load s | apart s | " + " | ".join(f"{case}: hits, p95 s, longest wait s" for case in cases))
    for run, loading, pace in ((1.0, 1.0, 0.3), (1.0, 2.0, 0.3), (2.0, 1.0, 0.6), (1.0, 1.0, 0.02), (0.5, 3.0, 0.5)):
        cells = []
        for case in cases.values():
            draws = [simulated(load(seed, pace), *case, run, loading, parallel) for seed in range(50)]
            hits, p95, longest = np.mean(draws, axis=0)
            cells.append(f"{hits:.1%}, {p95:.1f}, {longest:.1f}")
        print(f"{run} | {loading} | {pace} | " + " | ".join(cells), flush=True)


def queue(files: list[str], settings: ServeSettings, pace: float, answer: int, loads: int) -> None:
    """The same loads by each policy, through the server's own front. Kinds are given: the queue is what is timed.

    Args:
        pace: mean seconds between requests.
        answer: tokens of each.
        loads: each by every policy in turn.
    """
    from factorllm.serving.kinds import KindFront
    from factorllm.serving.proxy import Proxy

    class Told:
        """Which kind a request is of, its first letter says."""

        kinds = KINDS

        def probabilities(self, text: str) -> np.ndarray:
            return np.eye(KINDS)[int(text[0])]

    found: dict[str, list[tuple[float, ...]]] = {policy: [] for policy in POLICIES}
    print("load | policy | hits | loads | p50 s | p95 s | longest wait s | all s")
    for seed, policy in itertools.product(range(loads), POLICIES):
        front = KindFront("it", list(map(Path, files)), Told(), settings.model_copy(update={"policy": policy}))
        with Proxy("127.0.0.1", 0, front) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            row = ask_all(proxy.server_address[1], load(seed, pace), answer, front)
            proxy.shutdown()
        front.close()
        found[policy].append(row)
        print(_line(seed, policy, row), flush=True)
    for policy, rows in found.items():
        print(_line("mean", policy, np.mean(rows, axis=0)))


def _line(which: int | str, policy: str, row: Sequence[float]) -> str:
    hits, loads, *seconds = row
    return f"{which} | {policy} | {hits:.1%} | {loads:.1f} | " + " | ".join(f"{each:.2f}" for each in seconds)


def ask_all(port: int, arrivals: list[tuple[float, int]], answer: int, front) -> tuple[float, ...]:
    """Share of hits, loads, half and 95 % of the answers within, the longest wait, and all of it, in seconds."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
    took, start = [0.0] * len(arrivals), time.monotonic()

    def ask(number: int, at: float, kind: int) -> None:
        time.sleep(max(start + at - time.monotonic(), 0))
        prompt = f"{kind} This is request {number}, which asks for a few words."
        client.completions.create(model="it", prompt=prompt, max_tokens=answer, extra_body={"ignore_eos": True})
        took[number] = time.monotonic() - start - at

    threads = [threading.Thread(target=ask, args=(n, at, kind)) for n, (at, kind) in enumerate(arrivals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = dict(line.rsplit(" ", 1) for line in front.metrics().splitlines())
    hits, loads, longest = (
        float(counted[f"factorllm_{name}"]) for name in ("hits_total", "loads_total", "wait_seconds_max")
    )
    p50, p95 = np.percentile(took, [50, 95])
    return hits / len(arrivals), loads, p50, p95, longest, time.monotonic() - start


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("quality")
    for name in ("dense", "made", "general"):
        measured.add_argument(name)
    measured.add_argument("texts", nargs="+", help="unseen documents, a file of each kind")
    timed = commands.add_parser("queue")
    timed.add_argument("files", nargs=KINDS, help="GGUF files, one of each kind")
    timed.add_argument("--pace", type=float, default=0.1, help="mean seconds between requests")
    timed.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    timed.add_argument("--wait-limit", type=float, default=LIMIT, help="seconds, as of `factorllm serve`")
    timed.add_argument("--loads", type=int, default=1, help="of 64 requests each, one after another")
    foretold = commands.add_parser("simulate")
    for command in (timed, foretold):
        command.add_argument("--parallel", type=int, default=PARALLEL, help="requests that run at once")
    arguments = parser.parse_args()
    if arguments.command == "quality":
        quality(arguments.dense, arguments.made, arguments.general, arguments.texts)
    elif arguments.command == "queue":
        settings = ServeSettings(
            in_memory=IN_MEMORY,
            parallel=arguments.parallel,
            wait_limit=arguments.wait_limit,
            threads=1,
            context=256,
        )
        queue(arguments.files, settings, arguments.pace, arguments.answer, arguments.loads)
    else:
        simulate(arguments.parallel)


if __name__ == "__main__":
    main()
