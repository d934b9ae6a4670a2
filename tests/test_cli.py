"""The command line at its edges: options out of range, odd paths, what is printed, and how a command ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import comes_true
from forked import Forked, command, ended, free_port, run_main
from rich.console import Console
from test_outputs import SETTINGS, made, names, own  # noqa: F401  fixtures
from test_refusals import cli  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from factorllm import factorize
from factorllm.cli import app
from factorllm.cli.terminal import WIDE
from factorllm.dense.families import FAMILIES
from factorllm.engines.process import VLLM_PYTHON
from factorllm.hosts import HOSTS, MoeHost
from factorllm.hosts.table import NARROWEST, family_table, host_table
from factorllm.student.read import read_provenance

FEW = ("--tokens", 2048, "--held-out-tokens", 512)
REPOSITORY = Path(__file__).parent.parent


def printed(*words: object, **options) -> str:
    """What a command prints, in a process of its own; nothing of it may be on stderr."""
    done = ended(command(*words, **options))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


OUT_OF_RANGE = [
    *(("factorize", "--seed", n) for n in (-1, 2**32, 10**20)),
    *(("factorize", option, n) for option in ("--tokens", "--held-out-tokens") for n in (0, 10**20)),
    *(("factorize", "--tune", n) for n in (-1, 10**20)),
    *(("factorize", "--memory-limit", n) for n in (-1, 10**20)),
    *(("sample", "--length", n) for n in (1, 10**20)),
    *(("sample", "--temperature", n) for n in (0, 1e-300, 1e300, "nan")),
    *(("heal", "--epochs", n) for n in (0, 10**20)),
    *(("heal", option, n) for option in ("--batch", "--micro-batch", "--tokens") for n in (0, 10**20)),
    *(("heal", option, n) for option in ("--kinds", "--kind-rank") for n in (0, 10**20)),
    *(("heal", "--learning-rate", n) for n in (0, -1, 1e300, "inf")),
    *(("heal", "--router-rate", n) for n in (0, 1e4, "nan")),
    *(("heal", "--temperature", n) for n in (0, 1e-300, "nan")),
    *(("heal", f"--{name}-weight", n) for name in ("pa", "balance", "label", "hidden") for n in (-1, 1e300, "nan")),
    *(("bench", option, n) for option in ("--rounds", "--batch", "--threads") for n in (0, -1, 10**20)),
    ("bench", "--dtype", "float3"),
    ("bench", "--experts", "many"),
    *(("serve", option, n) for option in ("--port", "--context", "--parallel", "--threads") for n in (0, 10**20)),
    ("serve", "--port", 65_536),
    ("serve", "--context", 1),
    ("export", "--top-k", 10**20),
    *(("inspect", "--layer", n) for n in (-1, 10**20)),
    ("report", "--device", "meta"),
    ("report", "--device", "abacus"),
]


@pytest.mark.parametrize(("command", "option", "value"), OUT_OF_RANGE)
def test_an_option_out_of_range_is_refused(command, option, value, made, dense_folder, tmp_path, cli):  # noqa: F811
    words = {
        "factorize": [dense_folder, "-o", tmp_path / "out"],
        "sample": [dense_folder, "-o", tmp_path / "out.jsonl"],
        "heal": [made, "--teacher", dense_folder, "-o", tmp_path / "out"],
        "bench": [made, "--against", dense_folder],
        "export": [made, "-o", tmp_path / "out.gguf"],
        "inspect": [made, "--prompt", "the router"],
    }
    code, error = cli(command, *words.get(command, [made]), option, value)
    assert code == 2
    assert re.fullmatch(r"error: .*(--[a-z-]+: Input should|temperature of|top-k|no layer|device).*\n", error)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("where", ["here", "below", "trailing", "home"])
def test_odd_paths(where, made, dense_folder, text_file, tmp_path, monkeypatch, cli):  # noqa: F811
    """The model's folder as `.`, an output that is the current folder, one above it, one with a slash, one in `~`."""
    home = shutil.copytree(dense_folder, tmp_path / "a [" / "b] :x: 'n' é")
    (tmp_path / "new").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(home)
    out = {"here": "../new", "below": "sub/new", "trailing": f"{tmp_path}/new/", "home": "~/new"}[where]
    if where == "here":
        monkeypatch.chdir(tmp_path / "new")
    model, out = (f"../a [/{home.name}/", ".") if where == "here" else (".", out)
    code, error = cli("factorize", model, "-o", out, "--text", text_file, *FEW, "--no-baseline")
    assert (code, error) == (0, "")
    made = home / "sub" / "new" if where == "below" else tmp_path / "new"
    assert read_provenance(made)["base_model"]["name"] == home.name
    assert f"from the dense model `{home.name}`" in (made / "README.md").read_text()
    assert (made / "README.md").read_text().partition("# ")[2].startswith("new\n")
    assert names(tmp_path) == {"new", "a ["}


def test_a_folder_whose_name_begins_as_a_home_is_read(cli, dense_folder, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(dense_folder, tmp_path / "~gone")
    monkeypatch.chdir(tmp_path)
    assert cli("export", "./~gone", "-o", "./~gone/out.gguf", "--type", "f32") == (0, "")
    assert (tmp_path / "~gone/out.gguf").is_file()


def test_names_that_are_no_utf8(dense_folder, text_file, tmp_path, cli):  # noqa: F811
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    shutil.copy(text_file, odd)
    factorize(str(dense_folder), tmp_path / "out", "S2A2E8", text=odd, settings=SETTINGS)
    assert "Text: \N{REPLACEMENT CHARACTER}.txt, 2,048" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code, error = cli("factorize", dense_folder, "-o", odd[:-4], "--text", text_file, *FEW)
    assert code == 2
    assert "choose a name in UTF-8" in error


@pytest.mark.parametrize(
    "words", [("factorize", "-o", "out"), ("inspect", "--prompt", "hi"), ("export", "-o", "o.gguf")]
)
def test_a_folder_whose_name_is_no_utf8_is_not_called_damaged(words, made, tmp_path, monkeypatch, cli):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xff")
    shutil.copytree(made, odd)
    code, error = cli(words[0], odd, *words[1:])
    assert code == 2
    assert re.fullmatch(r"error: \\udcff cannot be used \('utf-8' .*\); rename it in UTF-8, .*\n", error)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "; set PYTHONUTF8=1, for this Python reads paths as ascii\n" in cli(words[0], odd, *words[1:])[1]
    assert names(tmp_path) == {odd}


@pytest.mark.engine
def test_a_gguf_file_whose_name_is_no_utf8(dense_folder, tmp_path, monkeypatch, cli):  # noqa: F811
    """It is converted and exported, and llama.cpp cannot open it."""
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xff.gguf")
    assert cli("export", dense_folder, "-o", "file.gguf") == (0, "")
    Path("file.gguf").rename(odd)
    assert cli("export", odd, "-o", "again.gguf") == (0, "")
    for word in ("chat", "serve"):
        code, error = cli(word, odd)
        assert code == 2
        assert "rename it in UTF-8" in error


def test_outputs_that_are_no_place_to_write(made, dense_folder, tmp_path, monkeypatch, cli):  # noqa: F811
    (tmp_path / "full" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "full" / "sub")
    for out, says in (("", "is empty"), ("..", "so it is never replaced"), ("/", "which this command reads")):
        code, error = cli("factorize", dense_folder, "-o", out)
        assert code == 2
        assert says in error
    for words in (["export", dense_folder], ["eval", made], ["sample", dense_folder]):
        code, error = cli(*words, "-o", tmp_path / "full" / "sub")
        assert code == 2
        assert re.search("is a folder, and -o is a file|is no .jsonl file", error)
    assert names(tmp_path) == {"full"}


def test_an_output_inside_an_input_folder_loses_nothing(own, dense_folder, text_file):  # noqa: F811
    model = shutil.copytree(dense_folder, own.parent / "dense")
    before = names(model)
    factorize(str(model), model / "student", "S2A2E8", text=str(text_file), settings=SETTINGS)
    assert names(model) == before | {"student"}
    AutoModelForCausalLM.from_pretrained(model)


def test_a_conversion_prints_nothing_of_transformers(dense_folder, text_file, tmp_path):
    words = ["--text", text_file, *FEW]
    said = printed("factorize", dense_folder, "-o", tmp_path / "out", *words)
    said += printed("report", tmp_path / "out", "--against", dense_folder)
    assert not re.search("Loading weights|Writing model|LOAD REPORT|transformers]", said)


def run_into_a_full_disk(words: list[str]) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    run_main(words)


def test_what_is_printed_may_find_the_disk_full():
    done = ended(Forked(run_into_a_full_disk, ["hosts"]))
    said = "error: no space left on the disk of what is printed; free some and repeat the command\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_scores_are_kept_where_they_cannot_be_printed(made, text_file, tmp_path):  # noqa: F811
    words = ["eval", made, "--text", text_file, "--tasks", "", "-o", tmp_path / "scores.json"]
    done = ended(Forked(run_into_a_full_disk, [str(word) for word in words]))
    assert (done.returncode, "what is printed" in done.stderr) == (2, True)
    assert json.loads((tmp_path / "scores.json").read_text())["perplexity"].keys() == {"student"}


def test_all_of_the_table_of_hosts_can_be_read():
    wide = printed("hosts", environment={"COLUMNS": "40"})
    for host in (host for host in HOSTS.values() if isinstance(host, MoeHost)):
        for cell in (host.name, ", ".join(host.all_engines), host.gates.rule):
            assert cell in wide
    for name, family in FAMILIES.items():
        assert re.search(rf"{name} +{re.escape(family.models)}", wide)
    console = Console(width=NARROWEST, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(family_table(NARROWEST))
    console.print(host_table(NARROWEST))
    narrow = console.export_text()
    assert "…" not in narrow
    for word in re.findall(r"\w\S*", wide):
        assert word in narrow


def test_the_documents_have_the_table_of_hosts():
    written = (REPOSITORY / "docs" / "choose-a-shape.md").read_text()
    shown = io.StringIO()
    Console(file=shown, width=WIDE).print(host_table(WIDE))
    for line in shown.getvalue().splitlines():
        assert line.rstrip() in written.splitlines()


def test_prune_keeps_a_share_of_each_ffn(dense_folder, text_file, tmp_path):
    said = printed("prune", dense_folder, "-o", tmp_path / "out", "--keep", "0.75", "--text", text_file, *FEW)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size in (32, 64)
    assert "dense" in said


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"factorllm {version('factorllm')}\n"


def serve_nothing(words: list[str]) -> None:
    """`serve` with a server that answers nothing."""
    import xllamacpp

    answers_nothing = SimpleNamespace(listening_address="here", handle_completions=lambda request: None)
    xllamacpp.Server = lambda params: answers_nothing
    run_main(words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_server_leaves_nothing(number, made):  # noqa: F811
    pytest.importorskip("xllamacpp")
    process = Forked(serve_nothing, ["serve", str(made), "--port", str(free_port())])
    while "stop with Ctrl-C" not in process.said()[0]:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    work = Path(re.search(r"into (\S+/factorllm-serve-\w+)", process.said()[0])[1])
    assert work.is_dir()
    os.kill(process.pid, number)
    done = ended(process)
    _, said = done.stdout.split("stop with Ctrl-C\n")
    assert (done.returncode, said, done.stderr) == (0, "stopped\n", "")
    assert not work.exists()


def test_vllms_server_ends_with_the_command(made, tmp_path):  # noqa: F811
    python, told = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {told}.new\nmv {told}.new {told}\nexec sleep 60\n")
    python.chmod(0o755)
    process = Forked(run_main, ["serve", str(made), "--engine", "vllm"], environment={VLLM_PYTHON: str(python)})
    assert comes_true(told.exists)
    server = int(told.read_text())
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process).returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_the_newest_python(tmp_path):
    for name, status in (("python3.14", 1), ("python3.13", 0), ("python3.11", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("sh", "cksum", "cut"):
        (tmp_path / name).symlink_to(shutil.which(name))
    make = [shutil.which("make"), "-n", "-C", str(REPOSITORY), "setup", "VENV=none"]
    only_those = {"PATH": str(tmp_path)}
    assert "python3.13 -m venv none" in subprocess.run(make, env=only_those, capture_output=True, text=True).stdout
    named = subprocess.run([*make, "PYTHON=mine"], env=only_those, capture_output=True, text=True).stdout
    assert "mine -m venv none" in named
    (tmp_path / "python3.13").unlink()
    (tmp_path / "python3.11").unlink()
    make.remove("-n")
    done = subprocess.run(make, env=only_those, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no Python from 3.11 on" in done.stderr
