"""Timing models in turns. Machines are noisy: what is compared is timed in one round; medians sum up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles

from rich.console import Console

from factorllm.engines import EngineProcess, Options
from factorllm.measure.speed.plan import SPARE, Plan
from factorllm.measure.speed.subjects import Subject
from factorllm.runs.progress import Meter, meter


@dataclass
class Measure:
    """What one model did.

    Attributes:
        threads: fastest thread counts for prompts and for decoding.
        speeds: tokens/s of each round, by what was timed.
        peak_memory: bytes of the engine's process.
    """

    subject: Subject
    threads: dict[str, int]
    speeds: dict[str, list[float]] = field(default_factory=dict)
    peak_memory: int = 0

    def speed(self, what: str) -> float:
        return median(self.speeds[what])

    def first_token(self, prompt: int) -> list[float]:
        """Seconds from a prompt of that length to the first token, of each round."""
        return [prompt / speed for speed in self.speeds[f"prefill {prompt}"]]

    def ratio(self, other: Measure, what: str) -> tuple[float, float, float]:
        """How much faster than `other`: median over the rounds, and the quartiles."""
        ratios = [own / its for own, its in zip(self.speeds[what], other.speeds[what], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        return middle, low, high


def measure_speed(subjects: list[Subject], engine: str, plan: Plan, console: Console) -> list[Measure]:
    """Time all models in one engine, in turns, each at its fastest thread counts.

    Raises:
        FactorLLMError: when the engine cannot load one of them.
    """
    measures = []
    for subject in subjects:
        measures.append(Measure(subject, _fastest_threads(subject, engine, plan)))
        console.print(f"{subject.name} is fastest with {_said(measures[-1].threads)} threads", highlight=False)

    def load(measure: Measure) -> _Loaded:
        return stack.enter_context(_Loaded(measure.subject, engine, plan, measure.threads))

    with ExitStack() as stack:
        with ThreadPoolExecutor(max(plan.thread_counts())) as pool:
            processes = list(pool.map(load, measures))
        with meter(console, "timing", plan.rounds * len(plan.names()) * len(subjects)) as bar:
            _take_turns(measures, processes, plan, bar)
        for measure, process in zip(measures, processes, strict=True):
            measure.peak_memory = process.single.peak_memory()
    return measures


def _take_turns(measures: list[Measure], processes: list[_Loaded], plan: Plan, bar: Meter) -> None:
    for number in range(plan.rounds):
        for name in plan.names():
            turns = list(zip(measures, processes, strict=True))
            for measure, process in turns if number % 2 else reversed(turns):
                measure.speeds.setdefault(name, []).append(process.speed(name))
                bar.advance(1)


class _Loaded(ExitStack):
    """A model, loaded once for single sequences and once for each batch, whose room would slow the single ones."""

    def __init__(self, subject: Subject, engine: str, plan: Plan, threads: dict[str, int]):
        super().__init__()
        self._plan = plan
        self._by_batch = {
            batch: self.enter_context(EngineProcess(engine, subject.path, _options(plan, batch, threads)))
            for batch in {1, *plan.batches}
        }

    @property
    def single(self) -> EngineProcess:
        return self._by_batch[1]

    def speed(self, name: str) -> float:
        """Tokens/s of one of `Plan.names`."""
        kind, number = name.split()
        if kind == "prefill":
            return int(number) / self.single.prefill(int(number))
        batch = int(number.removeprefix("x"))
        return batch / self._by_batch[batch].decode(batch, self._plan.context, self._plan.steps)


def _said(threads: dict[str, int]) -> str:
    return f"{threads['prefill']} (prompts) and {threads['decode']} (decoding)"


def _options(plan: Plan, batch: int, threads: dict[str, int]) -> Options:
    lengths = [plan.context + plan.steps, *(plan.prompts if batch == 1 else ())]
    return Options(max(lengths) + SPARE, batch, threads["decode"], threads["prefill"], plan.dtype, plan.experts)


def _fastest_threads(subject: Subject, engine: str, plan: Plan) -> dict[str, int]:
    """The thread counts at which prompts and single tokens are fastest, the best of three each."""
    counts, seconds = plan.thread_counts(), {}
    if len(counts) == 1:
        return {"prefill": counts[0], "decode": counts[0]}
    for count in counts:
        options = _options(plan, 1, {"prefill": count, "decode": count})
        with EngineProcess(engine, subject.path, options) as process:
            seconds[count] = {
                "prefill": min(process.prefill(min(plan.prompts)) for _ in range(3)),
                "decode": min(process.decode(1, plan.context, plan.steps) for _ in range(3)),
            }
    return {kind: min(counts, key=lambda count, kind=kind: seconds[count][kind]) for kind in ("prefill", "decode")}
