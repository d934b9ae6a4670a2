"""The command line: bad input gives one clear line and exit code 2, never a traceback, and leaves nothing behind."""

import builtins
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import BASE, CONFIGS, edit_json, save_dense
from families import TINY
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, NemotronHConfig, Starcoder2Config

from factorllm import (
    EvalSettings,
    FactorLLMError,
    FrontPlan,
    HealSettings,
    MakePlan,
    Plan,
    Recipe,
    ServeSettings,
    Settings,
    Wish,
    bench,
    evaluate,
    export,
    factorize,
    front,
    heal,
    make,
    make_planned,
    parse_recipe,
    sample,
    serve,
    trim,
)
from factorllm.baselines import layers_to_drop
from factorllm.cli import main
from factorllm.planning.forecast import forecast


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a command in this process: (exit code, stderr)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["factorllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture
def refused(cli, tmp_path, text_file):
    """Factorise; check that it is refused on one line, and that nothing was written. Returns the line."""

    def call(model: object, *options: object, text: object = text_file) -> str:
        code, error = cli("factorize", model, "-o", tmp_path / "out", "--text", text, "--tokens", 2048, *options)
        lines = [line for line in error.strip().splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(lines) == 1
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
        return lines[0]

    return call


@pytest.fixture
def own_dense(tmp_path):
    folder = tmp_path / "dense"
    save_dense(CONFIGS["gqa-tied"], folder)
    return folder


def test_no_such_model(refused, tmp_path):
    assert "no such model" in refused(tmp_path / "nowhere")
    assert "no such model" in refused("./nowhere.gguf")


def test_no_such_hub_model(refused, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "nobody/nothing is no local path, and the hub did not give it" in refused("nobody/nothing")


def test_unsupported_family_names_the_supported_ones(refused, tmp_path):
    save_dense(Starcoder2Config(**BASE), tmp_path / "starcoder2")
    line = refused(tmp_path / "starcoder2")
    assert "'starcoder2', which is not supported, and it cannot be: its FFN has biases" in line
    assert "at once; supported: llama (Llama" in line


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (["linear_attention", "full_attention"], "says no layer with an FFN, so there is nothing to cut"),
        (["linear_attention", "moe"], "is a Mixture of Experts already (nemotron_h)"),
    ],
)
def test_layers_of_which_none_has_a_dense_ffn_are_refused(kinds, says, refused, tmp_path):
    config = TINY["nemotron_h"].to_dict() | {"layers_block_type": kinds, "moe_intermediate_size": 32}
    save_dense(NemotronHConfig(**config), tmp_path / "dense")
    assert says in refused(tmp_path / "dense")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llama_4_scaling_beta": None}, "says no llama_4_scaling_beta in rope_parameters"),
        ({"rope_type": "default", "original_max_position_embeddings": None}, "no original_max_position_embeddings in"),
    ],
)
def test_ministral_3_without_what_scales_its_queries_is_refused(changes, says, refused, tmp_path):
    save_dense(TINY["ministral3"], tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", rope_parameters=TINY["ministral3"].rope_parameters | changes)
    assert says in refused(tmp_path / "dense")


def test_what_takes_layers_as_alike_is_refused_where_they_are_not():
    with pytest.raises(FactorLLMError, match="each layer of nemotron_h is one thing alone"):
        layers_to_drop(TINY["nemotron_h"], 1000)
    with pytest.raises(FactorLLMError, match="not each layer of nemotron_h has an FFN"):
        forecast(TINY["nemotron_h"])


def test_a_mixture_of_experts_is_told_that_it_is_one(refused, tmp_path):
    save_dense(MixtralConfig(**BASE), tmp_path / "mixtral")
    assert "is a Mixture of Experts already (mixtral)" in refused(tmp_path / "mixtral")


def write_gguf(path, architecture: str, tensors: int = 4) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for i in range(tensors):
        writer.add_tensor(f"t{i}", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unsupported_gguf_family(refused, tmp_path):
    write_gguf(tmp_path / "gemma.gguf", "gemma2")
    assert "'gemma2', which is not supported" in refused(tmp_path / "gemma.gguf")


@pytest.mark.parametrize("keep", [10, 100, 20_000])
def test_truncated_gguf(refused, tmp_path, keep):
    path = tmp_path / "short.gguf"
    write_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(path)


def test_not_a_model_file(refused, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"pickle")
    assert "not a .gguf" in refused(tmp_path / "model.bin")


@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_truncated_safetensors(refused, own_dense, keep):
    path = own_dense / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a whole safetensors file" in refused(own_dense)


@pytest.mark.parametrize("closed", ["text.txt", "dense/model.safetensors", "dense/config.json", "dense/tokenizer.json"])
def test_a_file_that_may_not_be_read(closed, refused, own_dense, text_file, tmp_path, monkeypatch):
    shutil.copy(text_file, tmp_path / "text.txt")

    def for_others(opened):  # root may read all
        def opens(path, *mode, **options):
            if str(path) == str(tmp_path / closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *mode, **options)

        return opens

    monkeypatch.setattr(Path, "open", for_others(Path.open))
    monkeypatch.setattr(builtins, "open", for_others(open))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / closed))
    line = refused(own_dense, text=tmp_path / "text.txt")
    what = f"the tokenizer of {own_dense}" if "tokenizer" in closed else str(tmp_path / closed)
    assert line == f"error: {what} cannot be used ([Errno 13] Permission denied: '{tmp_path / closed}'); let it be read"


def test_a_missing_tensor(refused, own_dense):
    weights = load_file(own_dense / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, own_dense / "model.safetensors")
    assert "lacks 1 tensors, model.layers.1.mlp.up_proj.weight" in refused(own_dense)


def test_a_missing_shard(refused, tmp_path):
    model = save_dense(CONFIGS["gqa-tied"], tmp_path / "sharded", max_shard_size="20KB")
    assert model is not None
    sorted((tmp_path / "sharded").glob("model-*.safetensors"))[-1].unlink()
    assert "is missing, though the index names it" in refused(tmp_path / "sharded")


def test_a_tensor_that_would_be_left_out(refused, own_dense):
    weights = load_file(own_dense / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(2)}
    save_file(weights, own_dense / "model.safetensors")
    assert "model.layers.0.extra.weight among them; leaving them out would change the model" in refused(own_dense)


def test_pickled_weights_only(refused, own_dense):
    (own_dense / "model.safetensors").rename(own_dense / "pytorch_model.bin")
    assert "pickled .bin files are never loaded" in refused(own_dense)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights(refused, own_dense, value):
    weights = load_file(own_dense / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = value
    save_file(weights, own_dense / "model.safetensors")
    assert "model.layers.2.mlp.down_proj.weight holds NaN or infinite values" in refused(own_dense)


def test_a_quantised_checkpoint(refused, own_dense):
    edit_json(own_dense / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert "is quantised (gptq)" in refused(own_dense)


def test_a_damaged_config(refused, own_dense):
    (own_dense / "config.json").write_text("{")
    assert "config.json cannot be used" in refused(own_dense)
    (own_dense / "config.json").unlink()
    assert "has no config.json" in refused(own_dense)


def test_what_transformers_reports_is_said_once(cli, own_dense, tmp_path, caplog):
    edit_json(own_dense / "config.json", use_return_dict="\ud83d")
    code, error = cli("export", own_dense, "-o", tmp_path / "out.gguf")
    assert (code, caplog.text) == (2, "")
    assert "property 'use_return_dict' of 'LlamaConfig' object has no setter" in error


def test_no_tokenizer(refused, own_dense):
    (own_dense / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(own_dense)


def test_sequences_of_one_token(refused, own_dense):
    edit_json(own_dense / "config.json", max_position_embeddings=1)
    assert "sequences of one token" in refused(own_dense)


def test_ffn_biases_and_other_activations(refused, tmp_path):
    save_dense(LlamaConfig(**BASE | {"mlp_bias": True}), tmp_path / "biased")
    assert "mlp.down_proj.bias in its FFN" in refused(tmp_path / "biased")
    save_dense(LlamaConfig(**BASE | {"hidden_act": "gelu"}), tmp_path / "gelu")
    assert "its experts compute silu, not gelu" in refused(tmp_path / "gelu")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [("S2A2E7", "64 neurons do not divide by 7"), ("S2A9E8", "use at most 6"), ("dense", "is not understood")],
)
def test_recipes(refused, dense_folder, recipe, says):
    assert says in refused(dense_folder, "--recipe", recipe)


def test_settings_that_cannot_be(refused, dense_folder):
    assert "no host 'gpt'" in refused(dense_folder, "--host", "gpt")
    assert "device 'abacus' cannot be used" in refused(dense_folder, "--device", "abacus")
    assert "--dtype" in refused(dense_folder, "--dtype", "int3")
    assert "--memory-limit: Input should be greater" in refused(dense_folder, "--memory-limit", "-1")


@pytest.mark.parametrize(
    ("settings", "chosen", "says"),
    [
        (Settings, {"tokens": True}, "true is no number"),
        (Settings, {"tune": "5"}, "'5' is text"),
        (HealSettings, {"pa_weight": False}, "false is no number"),
        (HealSettings, {"tokens": "1e5"}, "write a count as 100000, without quotes"),
        (EvalSettings, {"limit": True}, "true is no number"),
        (Plan, {"batches": [1, True]}, "true is no number"),
        (FrontPlan, {"threads": "4"}, "'4' is text"),
        (ServeSettings, {"port": "8080"}, "'8080' is text"),
        (Wish, {"time": True}, "true is no number"),
        (Recipe, {"shared": True, "active": 1, "parts": 4}, "true is no number"),
        (MakePlan, {"model": "a", "recipe": "S2A2E8", "text": "b", "vocabulary": True}, "true is no number"),
        (MakePlan, {"model": "a", "recipe": "S2A2E8", "sample": {"tokens": True}}, "true is no number"),
    ],
)
def test_what_is_no_number_is_not_taken_for_one(settings, chosen, says):
    with pytest.raises(ValidationError, match=says):
        settings(**chosen)


def test_numbers_are_those_of_python_numpy_and_yaml():
    assert Settings(tokens=np.int64(5), baseline=False).tokens == 5
    assert HealSettings(learning_rate="1e-4", pa_weight=np.float32(0.5), tokens=1e5).learning_rate == 1e-4
    assert Plan(batches=np.array([1, 8])).batches == (1, 8)
    assert Wish(time="60m", memory="1g", speed="1.5").time == 3600


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: factorize("m", "o", "S2A2E8", settings={"tokens": 5}),
            "{'tokens': 5} is no Settings; give one",
        ),
        (lambda: factorize("m", "o", "S2A2E8", settings=HealSettings()), "is no Settings; give one"),
        (lambda: factorize("m", "o", {"shared": 2}), "{'shared': 2} is neither a path nor a name"),
        (lambda: factorize("m", "o", "S2A2E8", images=5), "5 is neither a path nor a name"),
        (lambda: factorize("m", "a\0b", "S2A2E8"), "it is no path that can be there"),
        (lambda: heal("s", "m", "o", settings=Settings()), "is no HealSettings; give one"),
        (lambda: heal(None, "m", "o"), "None is neither a path nor a name"),
        (lambda: heal("s", "m", None), "None is neither a path nor a name"),
        (lambda: sample("m", "o.jsonl", settings=(1, 2)), "(1, 2) is no Settings; give one"),
        (lambda: sample("m", "o.jsonl", temperature="hot"), "--temperature 'hot' is no number"),
        (lambda: trim("m", "o", 300, None), "None is neither a path nor a name"),
        (lambda: trim("m", "o", 300, "t.txt", settings={}), "{} is no Settings; give one"),
        (lambda: evaluate("s", settings={"tasks": ()}), "{'tasks': ()} is no EvalSettings; give one"),
        (lambda: evaluate("s", chain=b"c.yaml"), "b'c.yaml' is neither a path nor a name"),
        (lambda: export("s", "o.gguf", ["q8_0"]), "no type ['q8_0']"),
        (lambda: export("s", "o.gguf", made_with={"seed": 1}), "{'seed': 1} is no Settings; give one"),
        (lambda: bench("s", ["m"], plan=FrontPlan()), "is no Plan; give one"),
        (lambda: bench("s", "m"), "against is 'm', and a list of models is wanted"),
        (lambda: bench("s", ["m"], None), "no engine 'none'"),
        (lambda: front("s", ["m"], "t.txt", "o"), "students is 's', and a list of models is wanted"),
        (lambda: front(["s"], [], "t.txt", "o"), "against is [], and a list of models is wanted"),
        (lambda: front(["s"], ["m"], "t.txt", "o", {"rounds": 2}), "{'rounds': 2} is no FrontPlan; give one"),
        (lambda: serve("m", settings={"port": 80}), "{'port': 80} is no ServeSettings; give one"),
        (lambda: make("m", "o", wish={"speed": 2}), "{'speed': 2} is no Wish; give one"),
        (lambda: make("m", "o", effort=["best"]), "no effort ['best']"),
        (lambda: make_planned(5), "5 is neither a path nor a name"),
        (lambda: parse_recipe(2), "2 is neither a path nor a name"),
    ],
)
def test_the_python_api_refuses_what_is_of_another_kind(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FactorLLMError, match=re.escape(says)):
        call()
    assert not list(tmp_path.iterdir())


def test_text_too_short(refused, dense_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    assert "the text is too short" in refused(dense_folder, text=short)


def test_too_many_tokens_asked_for_says_how_many_too_many(refused, dense_folder, text_file):
    asked = 10_000_000
    line = refused(dense_folder, "--tokens", asked)
    too_many = int(re.search(r"or take at least (\d+) off --tokens", line)[1])
    assert 0 < too_many < asked


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "no such text file"),
        ("odd.csv", "a,b", "not a kind of text that is read"),
        ("broken.json", "{", "cannot be used"),
        ("broken.jsonl", '{"text": "a"}\n{', "line 2 of text file"),
        ("keys.jsonl", '{"body": "a"}', "none of text, content"),
        ("broken.parquet", "PAR0", "cannot be used"),
    ],
)
def test_unreadable_text(refused, dense_folder, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert says in refused(dense_folder, text=path)


def test_binary_text(refused, dense_folder, tmp_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(bytes(range(128, 256)))
    assert "save it as UTF-8" in refused(dense_folder, text=path)


def test_inspect(cli, tmp_path):
    code, error = cli("inspect", tmp_path)
    assert code == 2
    assert "is no checkpoint made by factorllm" in error
    (tmp_path / "factorllm.json").write_text("{")
    code, error = cli("inspect", tmp_path)
    assert code == 2
    assert "is damaged" in error


def test_help_needs_no_torch():
    probe = "import sys, factorllm.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True, env=os.environ)
