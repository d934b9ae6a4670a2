"""Scores: those of lm-eval's own tasks, measured once; what cannot be scored is refused."""

import io
import json
import os
import shutil
import string
import sys
from inspect import unwrap

import pytest
import torch
from conftest import BASE, around_texts, byte_tokenizer, save_dense, some_tokens, tasks_of_lm_eval
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from factorllm import FactorLLMError, factorize
from factorllm.cli import main
from factorllm.measure import checkpoint_subject, score_cache
from factorllm.measure.agreement import on_text
from factorllm.measure.scores import Evaluation, evaluate
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import TASKS, Score, check_tasks, in_mean, local_task, retention, run_task
from factorllm.report import score_table
from factorllm.runs.settings import Settings
from factorllm.student.read import read_provenance

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
        elif task == "winogrande":
            sentence = f"{question} It's _ and nothing_else."
            own = {"sentence": sentence, "option1": two[0], "option2": two[1], "answer": "1"}
            local = {"query": sentence, "choices": two, "gold": label}
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
    return tasks_of_lm_eval("arc", "piqa", "super_glue/boolq", "super_glue/copa", "lambada", "winogrande")


@pytest.mark.parametrize("task", ["arc_easy", "piqa", "boolq", "copa", "lambada_openai", "winogrande"])
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

    from factorllm.measure.harness import Harness

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


def test_an_end_token_that_a_tokenizer_puts_behind_each_text_is_no_part_of_a_prompt(dense_folder):
    from lm_eval.api.instance import Instance

    from factorllm.measure.harness import Harness

    scored = [Instance("loglikelihood", {}, pair, 0) for pair in (("A", " b"), ("Which?\nAnswer:", " iron"))]
    kwargs = {"until": [], "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (prompt, kwargs), 0) for prompt in ("Q:", "x" * 70, "Which one?")]
    found = []
    for around in ("<s> $A", "<s> $A </s>"):
        model = AutoModelForCausalLM.from_pretrained(dense_folder)
        tokenizer = around_texts(byte_tokenizer(), around)
        harness = Harness(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=2)
        found.append((harness.loglikelihood(scored, disable_tqdm=True), harness.generate_until(asked, True)))
    assert found[0] == found[1]


def test_generation_counts_exact_answers(dense_folder, tmp_path, monkeypatch):
    from factorllm.measure.harness import Harness

    answers = ["Paris", "a cat", "no idea"]
    said = iter([" Paris", "A cat.", "something else"])
    monkeypatch.setattr(Harness, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    write_lines(tmp_path / "generation.jsonl", [{"prompt": "Q:", "answer": answer} for answer in answers])
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    found = run_task(model, byte_tokenizer(), "generation", tmp_path, None)
    assert found.value == pytest.approx(2 / 3)  # space, case and punctuation do not count
    assert found.questions == 3


@pytest.mark.parametrize("task", ["generation", "humaneval"])
def test_answers_are_greedy_whatever_a_generation_config_says(task, dense_folder, tmp_path):
    from lm_eval.api.instance import Instance

    from factorllm.measure.harness import Harness

    (tmp_path / f"{task}.jsonl").touch()
    kwargs = local_task(task, tmp_path)["generation_kwargs"] | {"until": [], "max_gen_toks": 24}
    said = []
    for penalty in (1.0, 9.0):
        model = AutoModelForCausalLM.from_pretrained(dense_folder)
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=penalty)
        harness = Harness(pretrained=model, tokenizer=byte_tokenizer(), max_length=64)
        said += harness.generate_until([Instance("generate_until", {}, ("Q:", kwargs), 0)], disable_tqdm=True)
    assert said[0] == said[1]


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
    settings = EvalSettings(tasks=("piqa", "lambada_openai"), data=data)
    options = {"against": str(dense_folder), "settings": settings, "cache": tmp_path / "c"}
    first = evaluate(student, **options)
    assert {name: set(found) for name, found in first.scores.items()} == {
        "student": {"piqa", "lambada_openai"},
        "dense": {"piqa", "lambada_openai"},
    }
    monkeypatch.setattr(checkpoint_subject, "run_task", lambda *_: pytest.fail("scored again"))
    assert evaluate(student, **options) == first
    write_lines(data / "piqa.jsonl", [local for _, local in forms("piqa")[:2]])
    monkeypatch.setattr(checkpoint_subject, "run_task", lambda *_: Score(0.5, 0.1, 2))
    assert evaluate(student, **options).scores["dense"]["piqa"].questions == 2


def test_perplexity_and_agreement_on_the_text_that_was_held_out(student, dense_folder, text_file):
    found = evaluate(student, against=str(dense_folder), text=str(text_file), settings=EvalSettings(tasks=()))
    made = read_provenance(student)["results"]
    assert found.perplexity == pytest.approx(
        {name: made[name]["perplexity"] for name in ("student", "dense")}, rel=1e-5
    )
    assert found.agreement.kl > 0
    assert 0 < found.agreement.top_1 < 1


def test_a_model_agrees_with_itself(dense_folder):
    model = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    _, found = on_text(model, model, some_tokens(model.config))
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


def test_a_mean_leaves_out_what_the_dense_model_guesses_and_says_so():
    dense = {
        "piqa": Score(0.7, 0.01, 100),
        "boolq": Score(0.51, 0.01, 100),
        "copa": Score(0.4, 0.02, 100),  # below chance it knows nothing either
        "lambada_openai": Score(0.02, 0.005, 100),
        "humaneval": Score(0.0, 0.0, 82),
    }
    student = {task: Score(0.6, 0.01, 100) for task in dense}
    assert in_mean(student, dense) == (["piqa", "lambada_openai"], ["boolq", "copa", "humaneval"])
    assert in_mean(student, {}) == (list(student), [])
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(score_table(Evaluation({"student": student, "dense": dense})))
    lines = [line.split() for line in console.export_text().splitlines()]
    shown = " ".join(word for line in lines for word in line)
    (mean,) = (line for line in lines if line[:1] == ["mean"])
    assert mean[1:4] == ["36.0%", "60.0%", "166.7%"]
    assert "not in the mean" in shown
    assert "above chance: boolq, copa, humaneval" in shown


def test_what_cannot_be_scored_is_refused(student, data, tmp_path):
    def refused(match: str, student=student, text=None, **changes):
        settings = EvalSettings(**{"tasks": ("piqa",), "data": data} | changes)
        with pytest.raises(FactorLLMError, match=match):
            evaluate(student, text=text, settings=settings, cache=tmp_path / "c")

    refused("unknown task 'nonsense'", tasks=["nonsense"])
    refused("nothing to measure", tasks=())
    refused("device 'abacus' cannot be used", device="abacus")
    refused("device 'meta' computes nothing", device="meta")
    refused("no file .*piqa.jsonl", data=tmp_path / "nowhere")
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
    refused(r"line 1 of .*piqa.jsonl cannot be used")
    (data / "piqa.jsonl").write_text('{"query": "a"}\n')
    refused("line 1: a record needs the keys choices, gold, query")


GOOD = {"query": "a", "choices": ["b", "c"], "gold": 1}


@pytest.mark.parametrize(
    ("task", "record", "says"),
    [
        ("piqa", GOOD | {"gold": 2}, "line 2: gold is 2, and must be the index of one of the 2 choices"),
        ("piqa", GOOD | {"gold": -1}, "gold is -1"),
        ("piqa", GOOD | {"gold": "1"}, "gold is '1'"),
        ("piqa", GOOD | {"gold": 1.0}, r"gold is 1\.0"),
        ("piqa", GOOD | {"gold": True}, "gold is True"),
        ("piqa", GOOD | {"gold": None}, "gold is None"),
        ("piqa", GOOD | {"choices": []}, "choices is no list of two texts or more"),
        ("piqa", GOOD | {"choices": ["b"]}, "choices is no list of two texts or more"),
        ("piqa", GOOD | {"choices": "bc"}, "choices is no list of two texts or more"),
        ("piqa", GOOD | {"choices": ["b", 5]}, "choices is no list of two texts or more"),
        ("piqa", GOOD | {"choices": ["b", " "]}, "choices is no list of two texts or more"),
        ("copa", GOOD | {"choices": ["b", "c", "d"]}, "copa has two choices, not 3"),
        ("winogrande", GOOD, "query has no _ where a choice goes, with words after it"),
        ("winogrande", GOOD | {"query": "a _ "}, "query has no _ where a choice goes, with words after it"),
        ("piqa", GOOD | {"query": " "}, "query is no text, or is empty"),
        ("piqa", GOOD | {"query": None}, "query is no text, or is empty"),
        ("piqa", GOOD | {"query": "half \ud83d"}, "query is no text, or is empty"),
        ("piqa", [GOOD], "a record needs the keys choices, gold, query"),
        ("lambada_openai", {"context": "a", "continuation": ""}, "continuation is no text"),
        ("generation", {"prompt": "a", "answer": 5}, "answer is no text"),
        ("piqa", None, "has no questions"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(task, record, says, student, tmp_path):
    first = {"lambada_openai": {"context": "a", "continuation": "b"}, "generation": {"prompt": "a", "answer": "b"}}
    write_lines(tmp_path / f"{task}.jsonl", [] if record is None else [first.get(task, GOOD), record])
    with pytest.raises(FactorLLMError, match=says):
        evaluate(student, settings=EvalSettings(tasks=(task,), data=tmp_path), cache=tmp_path / "c")


def test_what_lm_eval_and_datasets_raise_is_a_refusal_that_names_the_task(student, data, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("the disk of the cache is read-only")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FactorLLMError, match=r"the data of piqa cannot be used \(the disk of the cache"):
        evaluate(student, settings=EvalSettings(tasks=("piqa",), data=data), cache=tmp_path / "c")


def test_a_byte_order_mark_and_blank_lines_do_not_matter(dense_folder, tmp_path):
    (tmp_path / "piqa.jsonl").write_text("\ufeff" + json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD) + "\r\n")
    check_tasks(["piqa"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    assert run_task(model, byte_tokenizer(), "piqa", tmp_path, None).questions == 2


def test_questions_are_those_of_the_file_as_it_is_now(dense_folder, tmp_path):
    """`datasets` knows a file by its path, which it takes for a pattern, and its time."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder)

    def score(folder, gold, questions):
        folder.mkdir(exist_ok=True)
        write_lines(folder / "piqa.jsonl", questions * [GOOD | {"gold": gold}])
        os.utime(folder / "piqa.jsonl", (1_000_000_000, 1_000_000_000))
        return run_task(model, byte_tokenizer(), "piqa", folder, None)

    first, second = (score(tmp_path / "data", gold, 1).value for gold in (0, 1))
    assert sorted((first, second)) == [0, 1]
    score(tmp_path / "v1", 0, 3)
    assert score(tmp_path / "v[1]", 0, 2) == Score(first, 0.0, 2)


def test_an_answer_longer_than_the_context_is_refused(dense_folder, tmp_path):
    write_lines(tmp_path / "piqa.jsonl", [GOOD | {"choices": ["b", "c" * 100]}])
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(FactorLLMError, match="has 101 tokens, more than the 64 of the model's context"):
        run_task(model, byte_tokenizer(), "piqa", tmp_path, None)


def test_one_question_has_a_score_and_no_error(student, dense_folder, data, tmp_path):
    options = {"against": str(dense_folder), "cache": tmp_path / "c"}
    settings = EvalSettings(tasks=("piqa",), data=data, limit=1)
    first = evaluate(student, settings=settings, **options)
    again = evaluate(student, settings=settings, **options)
    assert first == again
    assert (first.scores["dense"]["piqa"].error, first.scores["dense"]["piqa"].questions) == (None, 1)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(score_table(first))
    assert "±" not in console.export_text()


@pytest.mark.parametrize(
    "change", [{"limit": 0}, {"limit": -1}, {"limit": 10**20}, {"dtype": "float8"}, {"shots": 5}, {"tasks": "piqa"}]
)
def test_options_that_cannot_be_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        EvalSettings(**change)


def scored(monkeypatch) -> list[str]:
    """What is measured from now on, as it happens."""
    found = []

    def run(model, tokenizer, task, data, limit, run_generated_code):
        found.append(task)
        return Score(0.5, None, 1)

    monkeypatch.setattr(checkpoint_subject, "run_task", run)
    return found


def test_a_damaged_cache_is_measured_again_and_one_that_cannot_be_written_is_done_without(
    student, data, tmp_path, monkeypatch
):
    found = scored(monkeypatch)
    settings = EvalSettings(tasks=("piqa",), data=data)
    for damage in ("", "{", "[]", '{"value": "N/A", "error": 0, "questions": 1}', '{"value": 1}'):
        evaluate(student, settings=settings, cache=tmp_path / "c")
        assert found.pop() == "piqa"
        next((tmp_path / "c").iterdir()).write_text(damage)
    (tmp_path / "file").write_text("")
    assert evaluate(student, settings=settings, cache=tmp_path / "file" / "c").scores["student"]["piqa"].value == 0.5


def test_a_score_is_of_all_that_decides_it(student, data, tmp_path, monkeypatch):
    found = scored(monkeypatch)
    copy = shutil.copytree(student, tmp_path / "copy")

    def measured(folder=copy, **changes) -> bool:
        settings = EvalSettings(**{"tasks": ("piqa",), "data": data} | changes)
        evaluate(folder, settings=settings, cache=tmp_path / "c")
        again, found[:] = bool(found), []
        return again

    assert measured()
    assert not measured()
    assert not measured(shutil.copytree(copy, tmp_path / "elsewhere"))
    assert measured(limit=1)
    assert measured(dtype="bfloat16")
    for name in ("generation_config.json", "tokenizer_config.json", "config.json"):
        content = json.loads((copy / name).read_text())
        extra = {"generation_config.json": "temperature", "tokenizer_config.json": "pad_token", "config.json": "note"}
        value = {"temperature": 0.5, "pad_token": "<s>", "note": 1}[extra[name]]
        (copy / name).write_text(json.dumps(content | {extra[name]: value}))
        assert measured(), name
        assert not measured(), name
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert measured()
    monkeypatch.setitem(TASKS, "piqa", TASKS["piqa"].__class__("acc", 0.5, "{{query}}"))
    assert measured()
    monkeypatch.setattr(score_cache, "version", lambda package: "0")
    assert measured()


def test_next_tokens_of_another_vocabulary_are_not_compared(student, text_file, tmp_path):
    save_dense(LlamaConfig(**BASE | {"vocab_size": 300}), tmp_path / "other")
    with pytest.raises(FactorLLMError, match="knows 258 tokens and the model of --against 300"):
        evaluate(student, against=str(tmp_path / "other"), text=str(text_file), settings=EvalSettings(tasks=()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--limit", "0"], "--limit: Input should be greater"),
        (["--dtype", "foo"], "--dtype: Input should be"),
        (["--tasks", " , "], "nothing to measure"),
        (["--tasks", "piqa,,nonsense"], "unknown task 'nonsense'"),
        (["-o", f"{__file__}/found.json"], "test_evaluate.py is a file; choose another -o"),
    ],
)
def test_the_command_refuses_on_one_line(options, says, student, data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["factorllm", "eval", str(student), "--data", str(data), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_task_that_is_named_twice_is_asked_once(student, data, tmp_path, monkeypatch):
    found, out = scored(monkeypatch), tmp_path / "found.json"
    monkeypatch.setitem(unwrap(evaluate).__kwdefaults__, "cache", tmp_path / "c")
    words = ["eval", str(student), "--data", str(data), "--tasks", "piqa,piqa", "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["factorllm", *words])
    with pytest.raises(SystemExit):
        main()
    assert found == ["piqa"]
    assert json.loads(out.read_text())["scores"] == {"student": {"piqa": {"value": 0.5, "error": None, "questions": 1}}}


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"base_model": "x"}'])
def test_what_is_no_provenance_is_refused(content, tmp_path):
    (tmp_path / "factorllm.json").write_text(content)
    with pytest.raises(FactorLLMError, match=r"factorllm\.json cannot be used"):
        read_provenance(tmp_path)
