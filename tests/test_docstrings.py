"""The examples of the public API are run, on a tiny model, in a folder that has what they name."""

from __future__ import annotations

import doctest
import inspect
import shutil
import time
from contextlib import suppress
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from conftest import CONFIGS
from test_export import save_model

import factorllm
from factorllm import Settings, factorize

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
