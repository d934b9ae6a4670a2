"""Engines in processes of their own."""

import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, save_dense, some_tokens
from families import TINY
from test_export import save_model

from factorllm import FactorLLMError
from factorllm.engines import EngineProcess, Options, engine_name
from factorllm.exporting import export_gguf
from factorllm.hosts import HOSTS
from factorllm.recipe import parse_recipe
from factorllm.serving.serve import choose_engine, vllm_arguments
from factorllm.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    save_model(CONFIGS["gqa-tied"], folder / "dense")
    export_gguf(str(folder / "dense"), folder / "dense.gguf", "f32")
    return folder


@pytest.mark.engine
@pytest.mark.parametrize(("engine", "model"), [("transformers", "dense"), ("llamacpp", "dense.gguf")])
def test_an_engine_answers_and_times(engine, model, folder):
    prompt = some_tokens(CONFIGS["gqa-tied"], rows=1, length=16)[0].tolist()
    with EngineProcess(engine, folder / model, Options(context=64, batch=2, decode_threads=1)) as process:
        top = process.next_tokens(prompt, 5)
        made = process.generate(prompt, 4)
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert made[0] == top[0][0]
        assert len(made) == 4
        assert process.next_tokens([*prompt, *made[:3]], 1)[0][0] == made[3]
        assert process.prefill(16) > 0
        assert process.decode(1, 16, 4) > 0
        assert process.decode(2, 16, 4) > 0
        assert process.peak_memory() > 10 << 20


def test_transformers_gives_the_log_probabilities_of_the_model_until_it_dies(tmp_path):
    model = save_dense(CONFIGS["mha"], tmp_path)
    prompt = some_tokens(CONFIGS["mha"], rows=1)
    with torch.no_grad():
        wanted = model(prompt).logits[0, -1].log_softmax(-1).topk(5)
    with EngineProcess("transformers", tmp_path, Options(dtype="float32")) as process:
        top = process.next_tokens(prompt[0].tolist(), 5)
        process._process.kill()
        with pytest.raises(FactorLLMError, match="it ended"):
            process.prefill(4)
    assert [token for token, _ in top] == wanted.indices.tolist()
    assert [value for _, value in top] == pytest.approx(wanted.values.tolist(), abs=1e-4)


@pytest.mark.engine
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.gguf").write_text("no model")
    with pytest.raises(FactorLLMError, match="llamacpp failed on") as error:
        EngineProcess("llamacpp", tmp_path / "bad.gguf")
    assert "\n" not in str(error.value)


def test_what_starts_vllm_needs_nothing_that_its_environment_lacks():
    """gguf and accelerate are no part of it; what is under `dense` and the others imports them."""
    script = "import sys, factorllm.engines.vllm, factorllm.engines.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "factorllm.engines.vllm" in loaded
    assert {"accelerate", "gguf", "torch", "transformers", "factorllm.dense"}.isdisjoint(loaded)


@pytest.mark.engine
def test_llamacpp_takes_as_many_threads_as_the_environment_allows(monkeypatch):
    pytest.importorskip("xllamacpp")
    from factorllm.engines.llamacpp import server_params

    def threads(**options) -> tuple[int, int]:
        params = server_params("model.gguf", Options(**options))
        return params.cpuparams.n_threads, params.cpuparams_batch.n_threads

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads() == (3, 3)
    assert threads(decode_threads=2) == (2, 2)
    assert threads(prefill_threads=2) == (3, 2)
    for nothing in ("", "0", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads() == (-1, -1)


def test_names_of_engines():
    assert engine_name("llama.cpp") == engine_name("LlamaCpp") == "llamacpp"
    with pytest.raises(FactorLLMError, match="engines: llamacpp, transformers, vllm"):
        engine_name("tensorrt")


def test_vllm_is_taken_for_what_it_serves(tmp_path, monkeypatch):
    """With a GPU; .gguf files and folders of `factorllm make` are llama.cpp's everywhere."""
    monkeypatch.setattr("factorllm.serving.serve.installed", lambda engine: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "made").mkdir()
    paths = [tmp_path, tmp_path / "model.gguf", tmp_path / "made"]
    assert [choose_engine(path) for path in paths] == ["vllm", "llamacpp", "llamacpp"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_engine(tmp_path) == "llamacpp"


@pytest.mark.parametrize(("host", "added"), [("lfm2_moe", ["--dtype", "float32"]), ("mixtral", [])])
def test_vllm_keeps_the_dtype_that_a_hosts_gates_need(host, added, tmp_path):
    """By default it takes weights of float32 in bfloat16, where those of LFM2 tie."""
    dense = {"lfm2_moe": TINY["lfm2"], "mixtral": CONFIGS["mha"]}[host]
    HOSTS[host].config(dense, parse_recipe("S0A2E8").shape(64)).save_pretrained(tmp_path)
    arguments = vllm_arguments(tmp_path, ServeSettings(), gpus=1)
    assert [word for word in arguments if word in ("--dtype", "float32")] == added
