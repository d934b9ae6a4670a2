"""Processes that share a conversion make what one makes."""

import json
import subprocess

import pytest
import torch
from conftest import relative_error
from forked import both, command, ended
from safetensors.torch import load_file

from factorllm.student.read import PARTITION_FILE

BATCH = 2048  # tokens


def run(program, dense_folder, out, text_file, tokens: int, *options: str) -> subprocess.CompletedProcess:
    words = [dense_folder, "-o", out, "--text", text_file, "--tokens", tokens, "--recipe", "S2A2E8", "--no-baseline"]
    words += ["--held-out-tokens", 4096]
    return program("factorize", *words, *options)


def alone(*words) -> subprocess.CompletedProcess:
    return ended(command(*words))


@pytest.fixture(scope="module")
def made(dense_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, program in (("one", alone), ("two", both)):
        done = run(program, dense_folder, folder / name, text_file, 5 * BATCH)  # five, so that the shares are uneven
        assert done.returncode == 0, done.stderr
        assert ("2 processes share" in done.stdout) == (name == "two")
    return folder


def content(folder, name: str):
    return json.loads((folder / name).read_text())


def test_neurons_are_in_the_same_experts(made):
    assert content(made / "one", PARTITION_FILE) == content(made / "two", PARTITION_FILE)


def test_the_first_layer_is_the_same_but_for_rounding(made):
    """Later layers are not: a token that is nearly undecided may go to another expert. By how a processor rounds, one
    does so here too, and moves the weights of its experts by a hundredth."""
    one, two = (load_file(made / name / "model-00002-of-00005.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert relative_error(two[name].float(), tensor.float()) < 3e-2, name


def test_statistics_are_those_of_all_the_text(made):
    one, two = (content(made / name, "factorllm.json") for name in ("one", "two"))
    for name in ("dense", "student"):
        assert two["results"][name]["perplexity"] == pytest.approx(one["results"][name]["perplexity"], rel=5e-3)
    for first, second in zip(one["layers"], two["layers"], strict=True):
        for name in ("router_agreement", "energy_kept", "stream_error"):
            assert second[name] == pytest.approx(first[name], rel=3e-2), name
        assert torch.tensor(second["expert_load"]).allclose(torch.tensor(first["expert_load"]), atol=2e-2)
    assert one["data"] == two["data"]


def test_processes_tune_together(made, dense_folder, text_file, tmp_path):
    """Each on its share, with the mean of both at the end."""
    for name, program in (("one", alone), ("two", both)):
        done = run(program, dense_folder, tmp_path / name, text_file, 5 * BATCH, "--tune", "2")
        assert done.returncode == 0, done.stderr
    errors = {folder: content(folder, "factorllm.json")["layers"][0]["stream_error"] for folder in tmp_path.iterdir()}
    untuned = content(made / "one", "factorllm.json")["layers"][0]["stream_error"]
    assert max(errors.values()) < untuned


def test_too_many_processes_for_the_text_are_refused(dense_folder, text_file, tmp_path):
    done = run(both, dense_folder, tmp_path / "out", text_file, BATCH)
    assert done.returncode != 0
    assert "2 processes cannot share" in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "out").exists()
