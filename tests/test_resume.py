"""A killed run resumes and ends with the same bytes; what is unfinished never looks finished; nothing is lost."""

import json
import shutil
import time

import pytest
from conftest import BASE, save_dense
from families import TINY
from forked import Forked
from test_factorize import contents
from transformers import AutoModelForCausalLM, LlamaConfig

from factorllm import FactorLLMError, factorize
from factorllm.convert.factorize import _commit_layer
from factorllm.runs.settings import Settings

LAYERS = 8
SETTINGS = Settings(tokens=4096, held_out_tokens=256, length=64, tune=1)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "deep"
    save_dense(LlamaConfig(**BASE | {"num_hidden_layers": LAYERS, "intermediate_size": 256}), folder)
    return folder


def run(deep_folder, out, text_file, **options):
    return factorize(str(deep_folder), out, "S2A2E8", text=str(text_file), settings=SETTINGS, **options)


def start(deep_folder, out, text_file) -> Forked:
    return Forked(run, deep_folder, out, text_file)


def journal_lines(out) -> int:
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def kill_after(process: Forked, out, lines: int, more_seconds: float) -> None:
    while journal_lines(out) < lines:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(more_seconds)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def whole(deep_folder, text_file, tmp_path_factory):
    """The output of a run that was never killed."""
    out = tmp_path_factory.mktemp("whole") / "student"
    run(deep_folder, out, text_file)
    return out


@pytest.fixture(scope="module")
def killed_once(deep_folder, text_file, tmp_path_factory):
    """The unfinished folder of a run that was killed after its third layer."""
    out = tmp_path_factory.mktemp("killed") / "student"
    kill_after(start(deep_folder, out, text_file), out, 3, 0.0)
    return out.with_name("student.partial")


@pytest.fixture
def killed(killed_once, tmp_path):
    """An output whose run was killed, a fresh copy for each test."""
    shutil.copytree(killed_once, tmp_path / "student.partial")
    return tmp_path / "student"


def test_a_run_killed_three_times_ends_with_the_same_bytes(deep_folder, text_file, whole, killed):
    for lines, more in ((4, 0.02), (6, 0.1)):
        kill_after(start(deep_folder, killed, text_file), killed, lines, more)
        assert not killed.exists()
        partial = killed.with_name("student.partial")
        assert not any(partial.rglob("config.json")), "an unfinished folder looks like a checkpoint"
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(partial / "student")
    before = journal_lines(killed)
    assert 6 <= before < LAYERS
    run(deep_folder, killed, text_file)
    assert contents(killed) == contents(whole)
    assert not killed.with_name("student.partial").exists()


def test_a_torn_journal_line_is_written_again(deep_folder, text_file, whole, killed):
    with (killed.with_name("student.partial") / "journal.jsonl").open("a") as file:
        file.write('{"layer": 4, "sec')
    run(deep_folder, killed, text_file)
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize("done", [1, 3], ids=("no FFN yet", "after one without"))
def test_a_run_goes_on_after_a_layer_without_an_ffn(done, tmp_path, text_file, small, monkeypatch):
    """Layers 1 and 3 of this Nemotron-H have an FFN, 0, 2 and 4 have none."""
    save_dense(TINY["nemotron_h"], tmp_path / "dense")
    commit = _commit_layer

    def killed(job, index, *rest):
        if index == done:
            raise KeyboardInterrupt
        commit(job, index, *rest)

    def made(name):
        out = tmp_path / name / "student"
        factorize(str(tmp_path / "dense"), out, "S4A0E8", text=str(text_file), settings=small)
        return contents(out)

    with monkeypatch.context() as patch:
        patch.setattr("factorllm.convert.factorize._commit_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            made("killed")
    assert journal_lines(tmp_path / "killed/student") == done
    assert made("killed") == made("whole")


def test_another_job_does_not_resume(deep_folder, text_file, killed):
    other = {"text": str(text_file), "settings": SETTINGS}
    with pytest.raises(
        FactorLLMError,
        match=r"with other recipes\.student\.shared \(2, now 1\).*--overwrite to discard it",
    ):
        factorize(str(deep_folder), killed, "S1A1E4", **other)
    summary = factorize(str(deep_folder), killed, "S1A1E4", **other, overwrite=True)
    assert summary.recipe.name == "S1A1E4"


def test_damaged_hidden_states_are_refused(deep_folder, text_file, killed):
    for path in (killed.with_name("student.partial") / "streams").glob("teacher.*"):
        data = bytearray(path.read_bytes())
        if data:  # the kill may have come just when the next layer's file was made
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
    with pytest.raises(FactorLLMError, match="damaged, so the run cannot go on"):
        run(deep_folder, killed, text_file)


def test_two_processes_do_not_write_one_output(deep_folder, text_file, tmp_path):
    out = tmp_path / "out"
    process = start(deep_folder, out, text_file)
    try:
        while journal_lines(out) < 1:
            time.sleep(0.01)
        with pytest.raises(FactorLLMError, match="another process is writing"):
            run(deep_folder, out, text_file)
    finally:
        process.kill()
        process.wait()


def test_a_foreign_partial_folder_is_left_alone(deep_folder, text_file, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(FactorLLMError, match="is no unfinished run"):
        run(deep_folder, tmp_path / "out", text_file)
    assert (partial / "thesis.txt").exists()


def test_a_full_disk_is_explained_and_the_run_goes_on_later(deep_folder, text_file, tmp_path, monkeypatch):
    import errno

    from factorllm.convert import write

    out, write_shard = tmp_path / "out", write.write_shard

    def full(path, tensors):
        if path.name.startswith("model-00004"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", full)
        with pytest.raises(FactorLLMError, match=r"no space left .* goes on where it stopped"):
            run(deep_folder, out, text_file)
    assert journal_lines(out) == 2
    run(deep_folder, out, text_file)
    assert json.loads((out / "factorllm.json").read_text())["format"] == 1


def test_a_disk_that_is_too_small_is_refused_at_once(deep_folder, text_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(FactorLLMError, match=r"no space left .* fewer --tokens"):
        run(deep_folder, tmp_path / "out", text_file)
