"""The examples of the public API are run, on a tiny model, in a folder that has what they name."""

from __future__ import annotations

import doctest
import inspect
import shutil
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import CONFIGS
from test_export import save_model
from test_plan import linear, run_and_timed_by

import factorllm
from factorllm import EvalSettings, FactorLLMError, HealSettings, MakePlan, Settings, Wish, factorize
from factorllm.planning import forecast as forecasting

COMMANDS = [name for name in factorllm.__all__ if inspect.isfunction(getattr(factorllm, name))]
NEEDS_LLAMACPP = {"bench", "front", "make", "plan", "serve"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    save_model(CONFIGS["gqa-tied"], folder)
    return folder


@pytest.fixture(scope="module")
def student(dense, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "student"
    settings = Settings(tokens=4096, held_out_tokens=512, length=64)
    factorize(str(dense), out, "S2A2E8", text=str(text_file), settings=settings)
    return out


def wait_for(url: str) -> None:
    """Wait until something answers."""
    for _ in range(300):
        with suppress(URLError, ConnectionError), urlopen(url):
            return
        time.sleep(0.2)
    pytest.fail(f"{url} does not answer")


def failures(public: object, **names: object) -> tuple[int, str]:
    """How many examples of a docstring there are, and what those that fail print."""
    said: list[str] = []
    tests = doctest.DocTestFinder(recurse=False).find(
        public, public.__name__, globs=vars(inspect.getmodule(public)) | names
    )
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test, out=said.append)
    return sum(len(test.examples) for test in tests), "".join(said)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.engine if name in NEEDS_LLAMACPP else ()) for name in COMMANDS]
)
def test_the_example_of(name, student, dense, text_file, tmp_path, monkeypatch):
    if name in NEEDS_LLAMACPP:
        pytest.importorskip("xllamacpp")
    monkeypatch.setattr(forecasting, "measure_speed", run_and_timed_by(linear))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "dense")
    shutil.copy(text_file, "my-text.txt")
    if name != "factorize":
        shutil.copytree(student, "student")
    count, said = failures(getattr(factorllm, name), wait_for=wait_for)
    assert count
    assert not said, said


@pytest.mark.parametrize("name", sorted(set(factorllm.__all__) - {*COMMANDS, "FactorLLMError"}))
def test_the_example_of_settings(name):
    count, said = failures(getattr(factorllm, name))
    assert count
    assert not said, said


@pytest.mark.parametrize("kind", [str, Path])
def test_every_function_takes_paths_as_text_and_as_paths(kind, dense, student, text_file, tmp_path, monkeypatch):
    """`~` too: of the user's home there, which is a folder with all of it here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, path in (("dense", dense), ("student", student), ("text.txt", text_file)):
        (tmp_path / name).symlink_to(path)
    (tmp_path / "recipe.yaml").write_text("shared: 2\nactive: 2\nparts: 8\n")
    few = Settings(tokens=512, held_out_tokens=128, length=64, baseline=False)
    short = HealSettings(tokens=512, validation_tokens=128, evaluations=1, learning_rate=1e-4)

    def at(name):
        return kind(f"~/{name}")

    text, tasks = at("text.txt"), EvalSettings(tasks=(), data=at("tasks"))
    assert tasks.data == tmp_path / "tasks"
    factorllm.factorize(at("dense"), at("out"), at("recipe.yaml"), text=text, settings=few)
    factorllm.heal(at("out"), at("dense"), at("healed"), text=text, settings=short)
    found = factorllm.evaluate(at("out"), against=at("dense"), text=text, settings=tasks, cache=at("cache"))
    assert set(found.perplexity) == {"student", "dense"}
    factorllm.sample(at("dense"), at("sampled.jsonl"), settings=Settings(tokens=128, length=64))
    factorllm.trim(at("dense"), at("trimmed"), 300, text, settings=few)
    factorllm.export(at("dense"), at("dense.gguf"))
    factorllm.export(at("out"), at("out.gguf"), text=text, tokens=64, tokenizer=at("dense.gguf"))
    made = MakePlan(model=at("dense"), recipe=at("recipe.yaml"), text=text)
    made.write(at("plan.yaml"))
    assert made == MakePlan(model=f"{tmp_path}/dense", recipe=f"{tmp_path}/recipe.yaml", text=f"{tmp_path}/text.txt")
    written = {"out", "healed", "sampled.jsonl", "trimmed", "dense.gguf", "out.gguf", "plan.yaml"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    # What takes long is refused, after the path was read.
    none, refused = at("none"), pytest.raises(FactorLLMError, match=f"no such model: {tmp_path}/none")
    with refused:
        factorllm.plan(none)
    with refused:
        factorllm.make(none, at("made"), wish=Wish(speed=1.2), text=text)
    with refused:
        factorllm.bench(none, [none], "transformers", out=at("speed"))
    with refused:
        factorllm.front([none], [none], text, at("front"), cache=at("cache"))
    with pytest.raises(FactorLLMError, match=f"{tmp_path}/none"):
        factorllm.make_planned(none, at("made"))
    with refused:
        factorllm.serve(none, "llamacpp", lossless=none)
