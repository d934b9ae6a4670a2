"""Benchmark tasks through lm-evaluation-harness: its prompts, its scoring; from the hub, or from local JSONL files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorllm.errors import FactorLLMError, one_line


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
    "winogrande": Task("acc", 0.5, "{{query}}"),
    "lambada_openai": Task("acc", 0.0, "{{context}}"),
    "mmlu": Task("acc", 0.25),
    "generation": Task("exact_match", 0.0, "{{prompt}}"),
}
"""Tasks that can be asked for. A local file `<task>.jsonl` holds records with `query`, `choices` and the index `gold`,
or, for LAMBADA, `context` and `continuation`; `generation` is not lm-eval's but the user's own, with `prompt` and the
`answer` that the model must write, up to the end of the line."""

_KEYS = {"lambada_openai": {"context", "continuation"}, "generation": {"prompt", "answer"}}


@dataclass(frozen=True)
class Score:
    """A model's score on one task, with its standard error and the number of questions."""

    value: float
    error: float
    questions: int


def run_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, data: Path | None, limit: int | None
) -> Score:
    """Score a model on one task.

    Args:
        data: folder of `<task>.jsonl`; None for lm-eval's own data on the hub.
        limit: questions; None for all.

    Raises:
        FactorLLMError: when lm-eval is not installed, or the hub cannot be reached.
    """
    try:
        from lm_eval import simple_evaluate

        from factorllm.evaluate.harness import Harness
    except ImportError:
        raise FactorLLMError("tasks need lm-eval, which is not installed: pip install 'factorllm[eval]'") from None
    harness = Harness(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH, trust_remote_code=False)
    manager = _task_manager(data is None)
    asked = local_task(task, data) if data else task
    try:
        found = simple_evaluate(harness, tasks=[asked], limit=limit, task_manager=manager, log_samples=False)
    except (ConnectionError, OSError) as error:
        raise FactorLLMError(
            f"the data of {task} cannot be fetched ({one_line(error)}); give local files with --data"
        ) from None
    return _score(found, task)


@cache
def _task_manager(known: bool):
    """lm-eval's registry; reading its thousands of `known` tasks takes many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=known)


def _score(found: dict, task: str) -> Score:
    result, metric = found["results"][task], TASKS[task].metric
    counts = [found["n-samples"][name]["effective"] for name in found["n-samples"] if name.startswith(task)]
    return Score(result[f"{metric},none"], result[f"{metric}_stderr,none"], sum(counts))


def check_tasks(tasks: list[str], data: Path | None) -> None:
    """Refuse unknown tasks and unreadable files before a model is loaded."""
    for task in tasks:
        if task not in TASKS:
            raise FactorLLMError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
        if data:
            _check_file(data / f"{task}.jsonl", task)
        elif task == "generation":
            raise FactorLLMError("generation has local files only; give the folder of generation.jsonl with --data")


def _check_file(path: Path, task: str) -> None:
    wanted = _KEYS.get(task, {"query", "choices", "gold"})
    if not TASKS[task].prompt:
        raise FactorLLMError(f"{task} is many tasks in one, so it has no local file; leave out --data")
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                if not isinstance(record, dict) or not wanted <= record.keys():
                    raise FactorLLMError(f"{path}, line {number}: a record needs the keys {', '.join(sorted(wanted))}")
    except FileNotFoundError:
        raise FactorLLMError(f"no file {path} for the task {task}; check --data") from None
    except (OSError, ValueError) as error:
        raise FactorLLMError(f"{path} cannot be read as JSON lines: {one_line(error)}") from None


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
    config = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((data / f"{task}.jsonl").resolve())}},
        "test_split": "test",
        "doc_to_text": known.prompt,
        "metric_list": [{"metric": known.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if task == "lambada_openai":
        return config | {"output_type": "loglikelihood", "doc_to_target": "{{' ' + continuation}}"}
    if task == "generation":
        return config | _GENERATION
    return config | {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": known.answers}


def retention(student: dict[str, Score], dense: dict[str, Score]) -> tuple[float | None, float | None]:
    """What is kept of the dense model's mean score: student / dense, and above chance, where a floor at chance shows.

    Returns:
        Both; None where the dense model is itself not above 0, or above chance.
    """
    kept, teacher = (sum(scores[task].value for task in student) for scores in (student, dense))
    chance = sum(TASKS[task].chance for task in student)
    plain = kept / teacher if teacher > 0 else None
    return plain, (kept - chance) / (teacher - chance) if teacher > chance else None
