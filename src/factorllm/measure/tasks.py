"""Benchmark tasks through lm-evaluation-harness: its prompts, its scoring; from the hub, or from local JSONL files."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, refusing
from factorllm.measure import humaneval
from factorllm.measure.programs import check_runner
from factorllm.runs.digest import digest_of
from factorllm.text.documents import json_lines, whole_characters

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class Task:
    """A task of lm-eval.

    Attributes:
        metric: the score that is reported; `acc_norm` where lm-eval's own reports use it.
        chance: the score of a guess.
        prompt: for a local file, the question as lm-eval's own task asks it, from the fields of a record.
        answers: for a local file, the possible answers, which lm-eval joins to the question with a space.
    """

    metric: str
    chance: float
    prompt: str = ""
    answers: str = "{{choices}}"


_BATCH = 8  # prompts that are continued at once
_QUESTION = "{{query.strip()}}\nAnswer:"

TASKS: dict[str, Task] = {
    "arc_easy": Task("acc_norm", 0.25, _QUESTION),
    "arc_challenge": Task("acc_norm", 0.25, _QUESTION),
    "piqa": Task("acc_norm", 0.5, _QUESTION),
    "boolq": Task("acc", 0.5, "{{query.removeprefix('Passage: ')}}\nAnswer:"),
    "copa": Task("acc", 0.5, "{{query}}", "{{[' ' + choices[0], ' ' + choices[1]]}}"),  # two spaces, as lm-eval has it
    "hellaswag": Task("acc_norm", 0.25, "{{query}}"),
    "openbookqa": Task("acc_norm", 0.25, "{{query}}"),
    "winogrande": Task(
        "acc", 0.5, "gold", "{{[query.partition('_')[0] + choices[0], query.partition('_')[0] + choices[1]]}}"
    ),
    "lambada_openai": Task("acc", 0.0, "{{context}}"),
    "mmlu": Task("acc", 0.25),
    "generation": Task("exact_match", 0.0, "{{prompt}}"),
    "humaneval": Task("pass_at_1", 0.0, "{{prompt}}"),
}
"""Tasks that can be asked for. A local file `<task>.jsonl` holds records with `query`, `choices` and the index `gold`,
or, for LAMBADA, `context` and `continuation`; `generation` is not lm-eval's but the user's own, with `prompt` and the
`answer` that the model must write, up to the end of the line. In `winogrande` the choices go where the query has `_`,
and what follows it is scored. `humaneval` has HumanEval's `prompt`, `test` and `entry_point`."""

_KEYS = {
    "lambada_openai": ("context", "continuation"),
    "generation": ("answer", "prompt"),
    "humaneval": ("entry_point", "prompt", "test"),
}
_LOCAL_ONLY = ("generation", "humaneval")
_RUNS_PROGRAMS = ("humaneval",)
_OF_TWO = ("copa", "winogrande")


@dataclass(frozen=True)
class Score:
    """A model's score on one task, with its standard error, which one question has not, and the number of questions."""

    value: float
    error: float | None
    questions: int


class Kept(NamedTuple):
    """What a student keeps of the dense model.

    Attributes:
        tasks: those that count, and `guessed` those that do not, as `in_mean` says.
        plain, above: as `retention` says.
    """

    tasks: list[str]
    guessed: list[str]
    plain: float | None
    above: float | None


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    data: Path | None,
    limit: int | None,
    run_generated_code: bool = False,
) -> Score:
    """Score a model on one task.

    Args:
        data: folder of `<task>.jsonl`; None for lm-eval's own data on the hub.
        limit: questions; None for all.
        run_generated_code: whether programs that the model writes may be run, which some tasks need.

    Raises:
        FactorLLMError: when lm-eval is not installed, the questions cannot be read, or programs may not be run.
    """
    need_lm_eval()
    from factorllm.measure.harness import Harness

    harness = Harness(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH, trust_remote_code=False)
    return ask(harness, task, data, limit, run_generated_code)


def need_lm_eval() -> None:
    """Refuse where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise FactorLLMError("tasks need lm-eval, which is not installed: pip install 'factorllm[eval]'") from None


def ask(harness: LM, task: str, data: Path | None, limit: int | None, run_generated_code: bool) -> Score:
    """Score what lm-eval has as a model, as `run_task` does."""
    from lm_eval import evaluate

    _check_programs(task, run_generated_code)
    loaded = _task_manager(data is None).load([_of_its_file(task, data) if data else task])
    # Not `simple_evaluate`, which starts git and pip to describe the machine: a process that is started while another
    # thread changes the environment's variables may be given freed memory for them.
    found = evaluate(harness, loaded, limit=limit, log_samples=False, confirm_run_unsafe_code=run_generated_code)
    return _score(found, task)


@cache
def _task_manager(known: bool):
    """lm-eval's registry; reading its thousands of `known` tasks takes many seconds."""
    from lm_eval.tasks import TaskManager

    class Refusing(TaskManager):
        def load(self, tasks):
            names = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
            with refusing(f"the data of {names}", "give local files with --data, or mend those that were given"):
                return super().load(tasks)

    return Refusing(include_defaults=known)


def _of_its_file(task: str, data: Path) -> dict:
    """`local_task`, named by what its file holds: `datasets` keeps what it has read of a path by the file's time, which
    other questions at the same path may have too."""
    return local_task(task, data) | {"dataset_name": digest_of([data / f"{task}.jsonl"])}


def _score(found: dict, task: str) -> Score:
    result, metric = found["results"][task], TASKS[task].metric
    counts = [found["n-samples"][name]["effective"] for name in found["n-samples"] if name.startswith(task)]
    error = result[f"{metric}_stderr,none"]  # the string N/A where there is none
    return Score(float(result[f"{metric},none"]), error if isinstance(error, float) else None, sum(counts))


def definition(task: str, local: bool) -> dict:
    """All that decides how a task asks and scores, but for its questions. lm-eval's own tasks are of its version."""
    known = asdict(TASKS[task])
    if task == "humaneval":
        return known | humaneval.definition()
    if not local:
        return known
    return known | {key: value for key, value in local_task(task, Path()).items() if key != "dataset_kwargs"}


def check_tasks(tasks: Sequence[str], data: Path | None, run_generated_code: bool = False) -> None:
    """Refuse unknown tasks, unreadable files, programs that may not be run and a missing lm-eval before a model is
    loaded."""
    for task in tasks:
        if task not in TASKS:
            raise FactorLLMError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
        _check_programs(task, run_generated_code)
        if task in _RUNS_PROGRAMS:
            check_runner()
        if data:
            _check_file(data / f"{task}.jsonl", task)
        elif task in _LOCAL_ONLY:
            raise FactorLLMError(f"{task} has local files only; give the folder of {task}.jsonl with --data")
    if tasks:
        need_lm_eval()


def _check_programs(task: str, allowed: bool) -> None:
    if task in _RUNS_PROGRAMS and not allowed:
        raise FactorLLMError(
            f"{task} runs programs that the model writes, with limits but on this machine; say --run-generated-code to "
            "allow it, best in a container, or leave the task out"
        )


def _check_file(path: Path, task: str) -> None:
    if not TASKS[task].prompt:
        raise FactorLLMError(f"{task} is many tasks in one, so it has no local file; leave out --data")
    if not path.exists():
        raise FactorLLMError(f"no file {path} for the task {task}; check --data")
    records = list(json_lines(path))
    for number, record in records:
        if wrong := _wrong(record, task):
            raise FactorLLMError(f"{path}, line {number}: {wrong}; mend it, or leave it out")
    if not records:
        raise FactorLLMError(f"{path} has no questions; fetch it again")


def _wrong(record: object, task: str) -> str | None:
    """What is wrong with a record of a local file, or None."""
    wanted = _KEYS.get(task, ("choices", "gold", "query"))
    if not isinstance(record, dict) or not record.keys() >= set(wanted):
        return f"a record needs the keys {', '.join(wanted)}"
    for key in wanted:
        if key not in ("choices", "gold") and not _is_text(record[key]):
            return f"{key} is no text, or is empty"
    if task == "winogrande" and not record["query"].partition("_")[2].strip():
        return "query has no _ where a choice goes, with words after it"
    return _wrong_choices(record["choices"], record["gold"], task) if "choices" in wanted else None


def _wrong_choices(choices: object, gold: object, task: str) -> str | None:
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        return "choices is no list of two texts or more, none of them empty"
    if task in _OF_TWO and len(choices) != 2:
        return f"{task} has two choices, not {len(choices)}"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"gold is {gold!r}, and must be the index of one of the {len(choices)} choices, the first of them 0"
    return None


def _is_text(value: object) -> bool:
    """Whether a tokenizer can take it: half a character, which JSON can hold, is none."""
    return isinstance(value, str) and bool(value.strip()) and whole_characters(value) == value


_GENERATION = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": True,
        }
    ],
}


def local_task(task: str, data: Path) -> dict:
    """The config of lm-eval's task `task`, with its questions from a local file."""
    known = TASKS[task]
    path = glob.escape(str((data / f"{task}.jsonl").resolve()))  # `datasets` takes it for a pattern
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}},
        "test_split": "test",
        "doc_to_text": known.prompt,
        "metric_list": [{"metric": known.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if task == "lambada_openai":
        return config | {"output_type": "loglikelihood", "doc_to_target": "{{' ' + continuation}}"}
    if task == "generation":
        return config | deepcopy(_GENERATION)  # lm-eval adds the end token to where an answer ends
    if task == "humaneval":
        return config | deepcopy(humaneval.HUMANEVAL)
    asked = {"output_type": "multiple_choice", "doc_to_choice": known.answers}
    if task == "winogrande":  # its choices are contexts, of which lm-eval's text is the index of the right one
        return config | asked | {"doc_to_target": "{{query.partition('_')[2].strip()}}"}
    return config | asked | {"doc_to_target": "gold"}


def in_mean(tasks: Iterable[str], dense: dict[str, Score]) -> tuple[list[str], list[str]]:
    """Tasks that a mean can be made of, and those that it leaves out: where the dense model is not two standard errors
    above chance, there is nothing to keep. Without a dense model, or with one question, no task is left out."""
    guessed = []
    for task in tasks:
        score = dense.get(task)
        if score and score.error is not None and score.value <= TASKS[task].chance + 2 * score.error:
            guessed.append(task)
    return [task for task in tasks if task not in guessed], guessed


def kept_in_mean(student: dict[str, Score], dense: dict[str, Score]) -> Kept:
    """The retention over the tasks that a mean can be made of."""
    tasks, guessed = in_mean(student, dense)
    return Kept(tasks, guessed, *retention({task: student[task] for task in tasks}, dense))


def retention(student: dict[str, Score], dense: dict[str, Score]) -> tuple[float | None, float | None]:
    """What is kept of the dense model's mean score: student / dense, and above chance, where a floor at chance shows.

    Returns:
        Both; None without a dense model, and where it is itself not above 0, or above chance.
    """
    if not dense:
        return None, None
    kept, teacher = (sum(scores[task].value for task in student) for scores in (student, dense))
    chance = sum(TASKS[task].chance for task in student)
    plain = kept / teacher if teacher > 0 else None
    return plain, (kept - chance) / (teacher - chance) if teacher > chance else None
