"""One comparison from end to end."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from factorllm.engines import check_installed, engine_name
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.subjects import open_subjects
from factorllm.measure.speed.table import as_json, speed_table, write_plot
from factorllm.measure.speed.timing import measure_speed
from factorllm.runs.apart import apart
from factorllm.runs.disk import explain_full_disk
from factorllm.runs.given import given, given_settings, given_several
from factorllm.runs.output import check_own_files, located, read_json
from factorllm.runs.workspace import write_json

_NUMBERS, _PLOT = "speed.json", "speed.png"


@apart()
def run_bench(
    student: str | Path,
    against: Sequence[str | Path],
    engine: str = "llamacpp",
    file_type: str = "q8_0",
    plan: Plan | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Table:
    """Time the models in turns; `speed.json` and `speed.png` are written to `out` if it is given.

    Args:
        against: the dense model first, then static prunes.
        file_type: what all models are exported as for llama.cpp, `.gguf` files too.
        plan: what is timed; where a model's context is too short for it, shorter prompts are.

    Raises:
        FactorLLMError: when a model or the engine cannot be used.

    Example:
        >>> plan = Plan(rounds=2, prompts=(8,), context=8, steps=4, batches=(1,), threads=(1,))
        >>> table = run_bench("student", ["dense"], "llamacpp", "f32", plan, "speed")
        >>> sorted(path.name for path in Path("speed").iterdir())
        ['speed.json', 'speed.png']
    """
    engine, plan, console = engine_name(engine), given_settings(plan, Plan()), console or Console(quiet=True)
    student, against = given(student), given_several("against", against)
    check_installed(engine)
    if out:
        out = located(out)
        check_own_files(out, (_NUMBERS, _PLOT), lambda folder: _is_ours(folder / _NUMBERS))
    with tempfile.TemporaryDirectory(prefix="factorllm-bench-") as work:
        subjects = open_subjects(student, against, engine, file_type, Path(work), console)
        plan = _fitting(plan, min(subject.context for subject in subjects), console)
        measures = measure_speed(subjects, engine, plan, console)
    title = f"{engine}, {file_type}" if engine == "llamacpp" else f"{engine}, {plan.dtype or 'own dtype'}"
    if out:
        with explain_full_disk(out, "free some, or choose another -o"):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / _NUMBERS, as_json(measures, plan, engine))
            write_plot(measures, plan, title, out / _PLOT)
    return speed_table(measures, plan, title)


def _fitting(plan: Plan, context: int, console: Console) -> Plan:
    """The plan, or a shorter one, which is said, where models read no more tokens than `context`."""
    fitting = plan.fitting(context)
    if fitting != plan:
        prompts = " and ".join(map(str, fitting.prompts))
        console.print(f"one of them reads no more than {context} tokens, so prompts have {prompts}", highlight=False)
    return fitting


def _is_ours(numbers: Path) -> bool:
    return {"engine", "plan", "models"} <= (read_json(numbers) or {}).keys()
