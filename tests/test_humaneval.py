"""Programs that models write: asked for as lm-eval asks, run within limits, and only where it was allowed."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import BASE, around_texts, byte_tokenizer, tasks_of_lm_eval, words
from rich.console import Console
from test_evaluate import write_lines
from test_export import byte_level_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import factorllm.measure.gguf_subject
from factorllm import FactorLLMError, factorize
from factorllm.cli import main
from factorllm.exporting import export_gguf
from factorllm.measure import humaneval, programs
from factorllm.measure.agreement import on_text
from factorllm.measure.gguf_subject import GgufSubject
from factorllm.measure.perplexity import perplexity
from factorllm.measure.programs import Limits, check_runner, passes
from factorllm.measure.scores import evaluate
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import check_tasks, definition, local_task, run_task
from factorllm.runs.settings import Settings

pytest.importorskip("lm_eval")

PROBLEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """{said}\n    """\n',
        "entry_point": name,
        "canonical_solution": f"    return {right}\n",
        "test": f"\n\ndef check(candidate):\n    assert candidate(4) == {result}\n",
    }
    for number, name, said, right, result in [
        (1, "twice", "Double it.", "2 * x", 8),
        (3, "square", "The square of it.", "x * x", 16),
        (5, "shorter", "One less.", "x - 1", 3),
    ]
]
SHORT = Limits(cpu_seconds=2, seconds=20)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "humaneval.jsonl", PROBLEMS)
    return folder


@pytest.fixture
def theirs(data, monkeypatch):
    """lm-eval's own task, on local data; what runs programs in its process comes from the hub, and is left out."""
    without = types.SimpleNamespace(load=lambda name: types.SimpleNamespace(compute=lambda **_: None))
    monkeypatch.setitem(sys.modules, "evaluate", without)
    manager = tasks_of_lm_eval("humaneval")
    swapped = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data / "humaneval.jsonl")}}}
    return manager._factory.build(manager._entry("humaneval"), overrides=swapped, registry=manager._index)


def test_problems_are_asked_and_counted_as_lm_evals_own_task_does(theirs, data):
    from lm_eval.tasks import TaskManager

    ours = TaskManager(include_defaults=False).load([local_task("humaneval", data)])["tasks"]["humaneval"]
    for task in (ours, theirs):
        task.build_all_requests()
    assert [each.args for each in ours.instances] == [each.args for each in theirs.instances]
    assert ours.instances[0].args[0] == PROBLEMS[0]["prompt"]
    assert [ours.doc_to_target(one) for one in ours.test_docs()] == [theirs.doc_to_target(one) for one in PROBLEMS]
    answers, docs = [["    return 2 * x\n"], ["    pass"]], PROBLEMS[:2]
    (filter_of_theirs,) = theirs._filters
    assert humaneval._whole_programs(answers, docs) == filter_of_theirs.filters[0]().apply(answers, docs)
    assert ours.UNSAFE_CODE
    assert theirs.UNSAFE_CODE


def answering(monkeypatch, *answers: str) -> None:
    """Every model says these, from now on."""
    from factorllm.measure.harness import Harness

    said = iter(answers)
    monkeypatch.setattr(Harness, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])


def test_right_programs_pass_and_wrong_ones_do_not(dense_folder, data, monkeypatch):
    answering(monkeypatch, "    return 2 * x\n", "    return x +\n", "    return x\n")
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    found = run_task(model, byte_tokenizer(), "humaneval", data, None, run_generated_code=True)
    assert found.value == pytest.approx(1 / 3)
    assert found.error == pytest.approx(1 / 3)  # the deviation of 1, 0, 0 by the root of 3
    assert found.questions == 3


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("assert sorted([2, 1]) == [1, 2]", True),
        ("from __future__ import annotations\nimport math, re, typing, collections, itertools, hashlib", True),
        ("open('here.txt', 'w').write('a file of its own')", True),
        ("print('a' * 10**7)", True),
        ("assert False", False),
        ("x = (", False),
        ("x = '\ud83d'", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("import os\nwhile True: os.fork()", False),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)", False),
        ("import threading\nthreading.Thread(target=print).start()", False),
        ("x = bytearray(2 << 30)", False),
        ("open('big', 'wb').write(bytes(2 << 20))", False),
        ("files = [open('program.py') for _ in range(100)]", False),
        ("import signal, os\nos.kill(os.getpid(), signal.SIGKILL)", False),
        ("import os\nassert os.environ.get('HOME')", False),
        ("assert input()", False),
    ],
)
def test_a_program_is_run_within_limits(program, wanted):
    assert passes(program, SHORT) is wanted


def test_a_program_that_waits_is_ended():
    assert not passes("import time; time.sleep(60)", Limits(seconds=2))


def test_a_program_leaves_nothing_and_reaches_no_folder_of_others(tmp_path, monkeypatch):
    seen: list = []
    status = programs._status
    monkeypatch.setattr(programs, "_status", lambda folder, limits: seen.append(folder) or status(folder, limits))
    marker = tmp_path / "marker"
    assert passes("import os\nassert os.listdir() == ['program.py']\nopen('other', 'w').write('x')", SHORT)
    assert not seen[0].exists()
    if programs.runner()[1] is not None:  # as root: a user's own files are the user's to write
        tmp_path.chmod(0o700)
        assert not passes(f"open({str(marker)!r}, 'w').write('x')", SHORT)
        assert not passes(f"open({__file__!r}, 'a').write('x')", SHORT)
    assert not marker.exists()


def test_where_no_program_can_be_run_it_is_refused(monkeypatch):
    monkeypatch.setattr(programs, "runner", lambda: ("/nowhere/python", None))
    with pytest.raises(FactorLLMError, match="programs cannot be run here"):
        check_runner()
    monkeypatch.setattr(programs, "runner", lambda: ("/bin/false", None))
    with pytest.raises(FactorLLMError, match="a program that is right did not pass here"):
        check_runner()


def test_nothing_is_run_without_the_option(dense_folder, data, tmp_path, monkeypatch, capsys):
    ran: list = []
    monkeypatch.setattr(programs.subprocess, "Popen", lambda *arguments, **_: ran.append(arguments))
    answering(monkeypatch, *["    return 2 * x\n"] * 9)
    says = "say --run-generated-code to allow it"
    with pytest.raises(FactorLLMError, match=says):
        check_tasks(["humaneval"], data)
    with pytest.raises(FactorLLMError, match=says):
        run_task(AutoModelForCausalLM.from_pretrained(dense_folder), byte_tokenizer(), "humaneval", data, None)
    with pytest.raises(FactorLLMError, match=says):
        evaluate(tmp_path / "x.gguf", settings=EvalSettings(tasks=("humaneval",), data=data), cache=tmp_path / "c")
    words_of_it = ["factorllm", "eval", str(tmp_path), "--tasks", "humaneval", "--data", str(data)]
    monkeypatch.setattr(sys, "argv", words_of_it)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
    assert not ran


def test_lm_eval_asks_too_whether_programs_may_be_run(dense_folder, data, monkeypatch):
    from factorllm.measure import tasks

    monkeypatch.setattr(tasks, "_check_programs", lambda *_: None)
    monkeypatch.setattr(humaneval, "passes", lambda *_: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match="unsafe"):
        run_task(AutoModelForCausalLM.from_pretrained(dense_folder), byte_tokenizer(), "humaneval", data, None)


def test_what_decides_a_score_is_in_its_key(monkeypatch):
    first = json.dumps(definition("humaneval", True))
    assert "cpu_seconds" in first
    assert "max_gen_toks" in first
    local_task("humaneval", Path())["generation_kwargs"]["until"].append("<end>")
    assert json.dumps(definition("humaneval", True)) == first


def test_a_context_without_room_for_a_program_is_refused(dense_folder, data):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(FactorLLMError, match="an answer may have 1024 tokens, and the model's context has 64"):
        run_task(model, byte_tokenizer(), "humaneval", data, None, run_generated_code=True)


def test_problems_that_cannot_be_asked_are_refused(data):
    allowed = {"run_generated_code": True}
    with pytest.raises(FactorLLMError, match="humaneval has local files only"):
        check_tasks(["humaneval"], None, **allowed)
    write_lines(data / "humaneval.jsonl", [{"prompt": "a", "test": "b"}])
    with pytest.raises(FactorLLMError, match="needs the keys entry_point, prompt, test"):
        check_tasks(["humaneval"], data, **allowed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student with room for 1024 tokens and more, its dense model, and both as GGUF files."""
    root = tmp_path_factory.mktemp("models")
    # Of few layers and a small spread, so that a thousand tokens are said soon, and none of them by a hair.
    config = LlamaConfig(**BASE | {"max_position_embeddings": 2048, "num_hidden_layers": 2})
    save_model(config, root / "dense")
    text = root / "text.txt"
    text.write_text("\n\n".join(words(40, seed) for seed in range(140)))
    settings = Settings(tokens=2048, held_out_tokens=512, length=64, baseline=False)
    factorize(str(root / "dense"), root / "student", "S2A2E8", text=str(text), settings=settings)
    for name in ("dense", "student"):
        export_gguf(str(root / name), root / f"{name}.gguf", "f32")
    return root


@pytest.mark.engine
def test_a_gguf_file_is_asked_as_its_folder_is(models, data, tmp_path, monkeypatch):
    """The same answers to the same questions, by llama.cpp and by transformers; none of them is true."""
    said: list = []
    whole = humaneval._whole_programs
    few = humaneval.HUMANEVAL["generation_kwargs"] | {"max_gen_toks": 24}
    monkeypatch.setitem(humaneval.HUMANEVAL, "generation_kwargs", few)

    def noted(answers, problems):
        said.append([text for one in answers for text in one])
        return whole(answers, problems)

    noting = [{"name": "none", "filter": [{"function": "custom", "filter_fn": noted}]}]
    monkeypatch.setitem(humaneval.HUMANEVAL, "filter_list", noting)
    monkeypatch.setattr("factorllm.measure.tasks.deepcopy", dict)
    settings = EvalSettings(tasks=("humaneval",), data=data, run_generated_code=True)
    for suffix in ("", ".gguf"):
        against = str(models / f"dense{suffix}")
        evaluate(models / f"student{suffix}", against=against, settings=settings, cache=tmp_path / f"c{suffix}")
    assert len(said) == 4
    assert sorted(said[:2]) == sorted(said[2:])  # files are asked side by side: either may be done first
    assert said[0] != said[1]


@pytest.mark.engine
def test_a_gguf_file_scores_as_its_folder_does(models, data, tmp_path):
    choices = ["a token", "an expert and a router", "half of a layer", "a caf\u00e9"]
    questions = [{"query": f"Question: {words(6, seed)}?", "choices": choices, "gold": seed % 4} for seed in range(8)]
    write_lines(data / "arc_easy.jsonl", questions)
    write_lines(data / "lambada_openai.jsonl", [{"context": words(9, seed), "continuation": "x"} for seed in range(3)])
    settings = EvalSettings(tasks=("arc_easy", "lambada_openai"), data=data)
    found = [
        evaluate(models / f"student{suffix}", settings=settings, cache=tmp_path / f"c{suffix}").scores["student"]
        for suffix in ("", ".gguf")
    ]
    assert found[0] == found[1]


@pytest.mark.engine
def test_log_probabilities_through_llamacpp_are_the_models(models):
    from lm_eval.api.instance import Instance

    from factorllm.engines import EngineProcess, Options
    from factorllm.measure.harness import Harness
    from factorllm.measure.served import Served

    pairs = [
        ("the router", " caf\u00e9"),
        ("x" * 40, "y" * 9),
        ("A", " token"),
        ("caf\u00e9", "\u00e9"),
        ("", "expert"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    model = AutoModelForCausalLM.from_pretrained(models / "student")
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    wanted = Harness(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    with EngineProcess("llamacpp", models / "student.gguf", Options(context=256)) as process:
        found = Served(process, 256, tokenizer.bos_token_id, ends=False).loglikelihood(requests, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-3)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]


@pytest.mark.engine
def test_an_end_token_that_a_file_puts_behind_each_text_is_not_scored(tmp_path):
    from lm_eval.api.instance import Instance

    from factorllm.engines import EngineProcess, Options
    from factorllm.measure.served import Served

    found = []
    for name, around in (("plain", "<s> $A"), ("ends", "<s> $A </s>")):
        save_model(LlamaConfig(**BASE), tmp_path / name, around_texts(byte_level_tokenizer(), around))
        export_gguf(str(tmp_path / name), tmp_path / f"{name}.gguf", "f32")
        subject = GgufSubject.of(tmp_path / f"{name}.gguf")
        with EngineProcess("llamacpp", subject.path, Options(context=64)) as process:
            served = Served(process, 64, subject.begin, subject.ends)
            scored = [Instance("loglikelihood", {}, pair, 0) for pair in (("the router", " expert"), ("", "token"))]
            found.append((served.loglikelihood(scored, disable_tqdm=True), served.tok_encode("the router")))
    assert found[0] == found[1]


@pytest.mark.engine
def test_a_text_says_the_same_through_llamacpp_and_through_transformers(models, tmp_path, monkeypatch):
    text, subjects = str(models / "text.txt"), {n: GgufSubject.of(models / f"{n}.gguf") for n in ("student", "dense")}
    tokens = subjects["student"].held_out(text, Settings(held_out_tokens=384, length=192))
    assert tokens.shape == (2, 192)
    tokens[:, 100] = AutoTokenizer.from_pretrained(models / "student").eos_token_id  # it is no end of the text here
    loaded = {name: AutoModelForCausalLM.from_pretrained(models / name) for name in subjects}
    followed = {name: subject.follow(tokens) for name, subject in subjects.items()}
    for name, model in loaded.items():
        assert followed[name].perplexity == pytest.approx(perplexity(model, tokens), rel=2e-3)  # f16 in its cache
        likeliest = model(tokens).logits[:, :-1].argmax(-1).flatten()
        assert (torch.tensor(followed[name].likeliest) == likeliest).float().mean() > 0.99
    close = followed["student"].agreement(followed["dense"])
    assert close.kl is None
    _, wanted = on_text(loaded["dense"], loaded["student"], tokens)
    assert close.top_1 == pytest.approx(wanted.top_1, abs=0.01)

    monkeypatch.setattr(GgufSubject, "held_out", lambda self, text: tokens)
    found = evaluate(
        models / "student.gguf", against=str(models / "dense.gguf"), text=text, settings=EvalSettings(tasks=())
    )
    # Sequences that run at once are not always put together in the same way, which changes the rounding.
    assert found.perplexity == pytest.approx({name: each.perplexity for name, each in followed.items()}, rel=2e-3)
    assert found.agreement.top_1 == pytest.approx(close.top_1, abs=0.01)


@pytest.mark.engine
def test_what_is_not_measured_through_llamacpp_is_refused(models, data, tmp_path, monkeypatch):
    def refused(match: str, model="student.gguf", **options):
        changes = {name: options.pop(name) for name in ("dtype", "device") if name in options}
        settings = EvalSettings(**{"tasks": ("arc_easy",), "data": data} | changes)
        with pytest.raises(FactorLLMError, match=match) as error:
            evaluate(models / model, settings=settings, cache=tmp_path / "c", **options)
        assert "\n" not in str(error.value)

    write_lines(data / "arc_easy.jsonl", [{"query": "a", "choices": ["b", "c" * 3000], "gold": 0}])
    refused("compares engines as well as models", against=str(models / "dense"))
    refused("leave out --device and --dtype", dtype="bfloat16")
    refused("no file .*nowhere.gguf", model="nowhere.gguf")
    refused("has 3001 tokens, and the model's context has 2048")
    shutil.copy(models / "text.txt", models / "text.gguf")
    refused("text.gguf cannot be used", model="text.gguf")
    monkeypatch.setattr(factorllm.measure.gguf_subject, "installed", lambda engine: False)
    refused("not installed; pip install")


@pytest.mark.engine
def test_files_are_scored_side_by_side_as_one_after_the_other_and_loaded_once_each(models, tmp_path, monkeypatch):
    from factorllm.measure import gguf_subject, score_cache

    write_lines(tmp_path / "piqa.jsonl", [{"query": f"q{n}", "choices": ["a", "b"], "gold": n % 2} for n in range(6)])
    write_lines(tmp_path / "lambada_openai.jsonl", [{"context": "the model", "continuation": "of"}])
    settings = EvalSettings(tasks=("piqa", "lambada_openai"), data=tmp_path)
    subjects = {name: GgufSubject.of(models / f"{name}.gguf") for name in ("student", "dense")}
    console, loaded, start = Console(quiet=True), [], gguf_subject.EngineProcess
    monkeypatch.setattr(gguf_subject, "EngineProcess", lambda *given: loaded.append(given) or start(*given))
    monkeypatch.setattr(score_cache.torch, "get_num_threads", lambda: 2)
    together = score_cache.scores_of_files(subjects, settings, tmp_path / "together", console)
    assert sorted((path.stem, options.decode_threads) for _, path, options in loaded) == [("dense", 1), ("student", 1)]
    alone = {
        name: score_cache.scores_of(each, name, settings, tmp_path / "c", console) for name, each in subjects.items()
    }
    assert together == alone
    assert list(together) == list(subjects)
    loaded.clear()
    assert score_cache.scores_of_files(subjects, settings, tmp_path / "c", console) == alone
    assert not loaded
    monkeypatch.setattr(score_cache, "available_memory", lambda: 0)
    assert score_cache.scores_of_files(subjects, settings, tmp_path / "third", console) == alone
    assert {options.decode_threads for *_, options in loaded} == {None}
