"""Scores: those of lm-eval's own tasks, measured once; what cannot be scored is refused."""

import json
import shutil
import string

import pytest
import torch
from conftest import byte_tokenizer, some_tokens
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError, factorize
from factorllm.evaluate import scores
from factorllm.evaluate.agreement import agreement
from factorllm.evaluate.scores import evaluate
from factorllm.evaluate.tasks import TASKS, Score, local_task, retention, run_task
from factorllm.inspection import read_provenance
from factorllm.settings import Settings

lm_eval = pytest.importorskip("lm_eval")

QUESTIONS = [
    ("Where does rain come from?", ["clouds", "a tree", "stones and sand", "the sun"], 0),
    ("What do bees make?", ["honey", "iron", "old newspapers", "a large river"], 0),
    ("What is ice?", ["warm air", "frozen water", "wood", "a sort of bread"], 1),
    ("Which animal can fly?", ["a cow", "a whale", "a snail on a leaf", "a sparrow"], 3),
]
SENTENCES = ["the cat sat on the mat", "a river runs to the sea", "we went home before the rain"]


def forms(task: str) -> list[tuple[dict, dict]]:
    """Each question as lm-eval's own data has it, and as a local file has it."""
    if task == "lambada_openai":
        return [
            ({"text": text}, {"context": text.rpartition(" ")[0], "continuation": text.rpartition(" ")[2]})
            for text in SENTENCES
        ]
    made = []
    for question, choices, gold in QUESTIONS:
        two, label = [choices[gold], choices[gold - 1]], 0
        if task == "arc_easy":
            own = {"question": question, "choices": {"text": choices, "label": list("ABCD")}, "answerKey": "ABCD"[gold]}
            local = {"query": f"Question: {question}", "choices": choices, "gold": gold}
        elif task == "piqa":
            own = {"goal": question, "sol1": two[0], "sol2": two[1], "label": label}
            local = {"query": f"Question: {question}\n", "choices": two, "gold": label}
        elif task == "boolq":
            own = {"passage": "It is said.", "question": question.rstrip("?"), "label": gold % 2}
            local = {"query": f"Passage: It is said.\nQuestion: {question}", "choices": ["no", "yes"], "gold": gold % 2}
        else:
            own = {"premise": "It happened.", "question": "cause", "label": label}
            own |= {"choice1": two[0].capitalize(), "choice2": two[1].capitalize()}
            local = {"query": "It happened because", "choices": two, "gold": label}
        made.append((own, local))
    return made


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def asked(task) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.fixture(scope="module")
def manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.mark.parametrize("task", ["arc_easy", "piqa", "boolq", "copa", "lambada_openai"])
def test_a_local_file_asks_and_scores_as_lm_eval_itself_does(task, manager, dense_folder, tmp_path):
    from lm_eval.models.huggingface import HFLM

    own, local = zip(*forms(task), strict=True)
    write_lines(tmp_path / "own.jsonl", own)
    write_lines(tmp_path / f"{task}.jsonl", local)
    file = str(tmp_path / "own.jsonl")
    swapped = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), file)},
    }
    theirs = manager._factory.build(manager._entry(task), overrides=swapped, registry=manager._index)
    ours = manager.load([local_task(task, tmp_path)])["tasks"][task]
    assert asked(theirs) == asked(ours)

    model = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(dense_folder), tokenizer=byte_tokenizer())
    metric = f"{TASKS[task].metric},none"
    found = [
        lm_eval.simple_evaluate(model, tasks=[it], task_manager=manager)["results"][task][metric]
        for it in (theirs, local_task(task, tmp_path))
    ]
    assert found[0] == found[1]


def test_the_harness_scores_as_lm_evals_own_model_does(dense_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from factorllm.evaluate.harness import Harness

    contexts = ["A", "The moon is", "Which of these is a metal?\nAnswer:", "x" * 70, *string.digits]
    continuations = [*string.printable, " a", " iron", " a long answer with many words", "y" * 40]
    pairs = [(context, continuation) for context in contexts for continuation in continuations]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    theirs, ours = (
        kind(pretrained=model, tokenizer=byte_tokenizer(), max_length=64).loglikelihood(requests, disable_tqdm=True)
        for kind in (HFLM, Harness)
    )
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert any(greedy for _, greedy in ours)


def test_generation_counts_exact_answers(dense_folder, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    answers = ["Paris", "a cat", "no idea"]
    said = iter([" Paris", "A cat.", "something else"])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    write_lines(tmp_path / "generation.jsonl", [{"prompt": "Q:", "answer": answer} for answer in answers])
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    found = run_task(model, byte_tokenizer(), "generation", tmp_path, None)
    assert found.value == pytest.approx(2 / 3)  # space, case and punctuation do not count
    assert found.questions == 3


@pytest.fixture(scope="module")
def student(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    settings = Settings(tokens=2048, held_out_tokens=512, length=64, baseline=False)
    factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=settings)
    return out


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for task in ("piqa", "lambada_openai"):
        write_lines(folder / f"{task}.jsonl", [local for _, local in forms(task)])
    return folder


def test_nothing_is_scored_twice(student, dense_folder, data, tmp_path, monkeypatch):
    options = {"against": str(dense_folder), "tasks": ["piqa", "lambada_openai"], "data": data, "cache": tmp_path / "c"}
    first = evaluate(student, **options)
    assert {name: set(found) for name, found in first.scores.items()} == {
        "student": {"piqa", "lambada_openai"},
        "dense": {"piqa", "lambada_openai"},
    }
    monkeypatch.setattr(scores, "run_task", lambda *_: pytest.fail("scored again"))
    assert evaluate(student, **options) == first
    write_lines(data / "piqa.jsonl", [local for _, local in forms("piqa")[:2]])
    monkeypatch.setattr(scores, "run_task", lambda *_: Score(0.5, 0.1, 2))
    assert evaluate(student, **options).scores["dense"]["piqa"].questions == 2


def test_perplexity_and_agreement_on_the_text_that_was_held_out(student, dense_folder, text_file):
    found = evaluate(student, against=str(dense_folder), tasks=[], text=str(text_file))
    made = read_provenance(student)["results"]
    assert found.perplexity == pytest.approx(
        {name: made[name]["perplexity"] for name in ("student", "dense")}, rel=1e-5
    )
    assert found.agreement.kl > 0
    assert 0 < found.agreement.top_1 < 1


def test_a_model_agrees_with_itself(dense_folder):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    found = agreement(model, model, some_tokens(model.config))
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top_1 == 1


def test_retention_above_chance_shows_a_floor():
    dense = {"piqa": Score(0.7, 0.01, 100), "arc_easy": Score(0.45, 0.01, 100)}
    floor = {"piqa": Score(0.5, 0.01, 100), "arc_easy": Score(0.25, 0.01, 100)}
    plain, above = retention(floor, dense)
    assert plain == pytest.approx(0.75 / 1.15)
    assert above == pytest.approx(0)
    assert retention(dense, dense) == (1, 1)
    assert retention(dense, floor)[1] is None


def test_what_cannot_be_scored_is_refused(student, data, tmp_path):
    def refused(match: str, **changes):
        with pytest.raises(FactorLLMError, match=match):
            evaluate(**{"student": student, "tasks": ["piqa"], "data": data, "cache": tmp_path / "c"} | changes)

    refused("unknown task 'nonsense'", tasks=["nonsense"])
    refused("no file .*boolq.jsonl", tasks=["boolq"])
    refused("no checkpoint made by factorllm", student=tmp_path)
    refused("has no local file", tasks=["mmlu"])
    refused("generation has local files only", tasks=["generation"], data=None)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "factorllm.json").write_text("{")
    refused("is damaged", student=damaged)
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(f"{shard.name}.* damaged", student=broken)
    shard.unlink()
    refused(f"{shard.name}", student=broken)
    (data / "piqa.jsonl").write_text('{"query": "a", "choices')
    refused("cannot be read as JSON lines")
    (data / "piqa.jsonl").write_text('{"query": "a"}\n')
    refused("line 1: a record needs the keys choices, gold, query")
