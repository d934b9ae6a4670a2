"""Outputs: what is written is finite and is what was computed, or nothing is published and the refusal says why."""

import math

import gguf
import numpy as np
import pytest
import torch
from conftest import CONFIGS, save_dense
from rich.console import Console
from safetensors.torch import load_file, save_file

from factorllm import FactorLLMError, factorize
from factorllm.exporting.ggml import ONLY_GGML, quantize
from factorllm.healing.run import FactorTrainer, heal
from factorllm.healing.settings import HealSettings
from factorllm.runs.settings import Settings
from factorllm.runs.stored import refuse_unquantisable
from factorllm.student.routers import is_router

SMALL = Settings(tokens=1024, held_out_tokens=256, length=64, baseline=False)
DOWN = "model.layers.0.mlp.down_proj.weight"


def dense_with(folder, changes, dtype=torch.float32, config=CONFIGS["gqa-untied"]):
    """A dense model in which functions of tensors stand for them, by parts of their names."""
    save_dense(config, folder)
    weights = load_file(folder / "model.safetensors")
    for part, change in changes.items():
        weights |= {name: change(tensor) for name, tensor in weights.items() if part in name}
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', f'"dtype": "{str(dtype).split(".")[1]}"'))
    return str(folder)


def with_one(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.fixture
def refused(text_file, tmp_path):
    def call(model, recipe="S2A2E8", match="", **changes):
        settings = SMALL.model_copy(update=changes)
        with pytest.raises(FactorLLMError, match=match):
            factorize(model, tmp_path / "out", recipe, text=str(text_file), settings=settings)
        assert not (tmp_path / "out").exists()

    return call


@pytest.mark.parametrize(("host", "recipe"), [("qwen2_moe", "S0A8E8"), ("mixtral", "S0A4E8")])
def test_what_a_host_scales_past_float16_is_refused(host, recipe, refused, tmp_path):
    model = dense_with(tmp_path / "dense", {DOWN: with_one(3e4)}, torch.float16)
    refused(model, recipe, r"tensor model.layers.0.*reaches [0-9.e+]+, and float16 holds 65504 .*bfloat16", host=host)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "model.norm", "layers.2.input_layernorm", DOWN])
def test_weights_that_float16_does_not_hold_are_refused_before_the_work(name, refused, tmp_path, monkeypatch):
    model = dense_with(tmp_path / "dense", {name: with_one(1e5)}, torch.bfloat16)
    monkeypatch.setattr("factorllm.convert.factorize.convert_layer", lambda *_: pytest.fail("a layer was converted"))
    refused(model, match=rf"tensor .*{name}.* reaches 99840, and float16 holds 65504", dtype="float16")


def test_a_final_norm_that_its_scale_makes_too_large_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("factorllm.convert.write.fit_logit_scale", lambda *_: 2.0)
    model = dense_with(tmp_path / "dense", {"model.norm": with_one(4e4)}, torch.float16)
    refused(model, match=r"tensor model.norm.weight reaches 80000, and float16")


def test_numbers_that_float16_takes_for_zero_are_refused(refused, tmp_path):
    tiny = {"layers.1.mlp.up_proj": lambda tensor: tensor * 1e-9}
    model = dense_with(tmp_path / "dense", tiny)
    refused(
        model, match=r"tensor model.layers.1.mlp.up_proj.weight holds numbers of .* too few digits", dtype="float16"
    )


def test_a_router_that_float16_would_change_is_refused(refused, tmp_path):
    large = {"layers.1.post_attention_layernorm": lambda tensor: tensor * 1e4}  # so its router's weights are small
    model = dense_with(tmp_path / "dense", large)
    refused(model, match=r"tensor model.layers.1.*(gate|router).* too few digits", dtype="float16")


@pytest.mark.parametrize("host", ["granitemoeshared", "qwen2_moe", "glm4_moe"])
def test_stored_routers_pick_the_same_experts_in_each_dtype(host, dense_folder, text_file, tmp_path):
    picks, x = {}, torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    for dtype in ("float32", "bfloat16", "float16"):
        settings = SMALL.model_copy(update={"dtype": dtype, "host": host})
        factorize(str(dense_folder), tmp_path / dtype, "S2A2E8", text=str(text_file), settings=settings)
        weights = {}
        for path in sorted((tmp_path / dtype).glob("*.safetensors")):
            weights |= load_file(path)
        names = [name for name in weights if is_router(name.replace(".layer.", "."))]
        routers = torch.stack([weights[name] for name in names]).float()
        picks[dtype] = (x @ routers.transpose(1, 2)).topk(2).indices.sort().values
        gates = [tensor for name, tensor in weights.items() if "shared_expert_gate" in name]
        assert all((gate == 2.0**-24).all() for gate in gates)
    for dtype, same in (("bfloat16", 0.98), ("float16", 0.995)):
        assert (picks[dtype] == picks["float32"]).float().mean() > same


@pytest.mark.parametrize(
    ("part", "factor", "match"),
    [
        ("down_proj", 1e20, "overflows float32"),
        ("up_proj", 1e20, "overflows float32"),
        ("post_attention_layernorm", 1e20, "computes NaN or infinity"),
        ("embed_tokens", 1e20, "all 0, or too large"),
        ("embed_tokens", 0.0, "all 0, or too large"),
        ("lm_head", 1e20, "perplexity of the dense model is inf"),
    ],
)
def test_activations_that_cannot_be_computed_with_are_refused(part, factor, match, refused, tmp_path):
    refused(dense_with(tmp_path / "dense", {part: lambda tensor: tensor * factor}), match=match)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_without_a_perplexity_is_not_published(value, dense_folder, refused, monkeypatch):
    values = iter([9.0, value])
    monkeypatch.setattr("factorllm.convert.finish.perplexity", lambda *_: next(values))
    refused(str(dense_folder), match=f"perplexity of the student model is {value}")


def test_a_static_prune_without_a_perplexity_is_left_out(dense_folder, text_file, tmp_path, monkeypatch):
    values, console = iter([9.0, 10.0, math.inf]), Console(record=True, width=200)
    monkeypatch.setattr("factorllm.convert.finish.perplexity", lambda *_: next(values))
    settings = SMALL.model_copy(update={"baseline": True})
    made = factorize(
        str(dense_folder), tmp_path / "out", "S2A2E8", text=str(text_file), settings=settings, console=console
    )
    assert [row.name for row in made.rows] == ["dense", "student"]
    assert "perplexity of the static prune is no finite number" in console.export_text()


def test_a_training_that_diverged_is_not_published(dense_folder, text_file, tmp_path, monkeypatch):
    train = FactorTrainer.train

    def diverge(trainer, **options):
        train(trainer, **options)
        trainer.state.best_global_step = 1  # a step that is better than the start, and NaN all the same
        next(trainer.model.parameters()).data.fill_(math.nan)

    factorize(str(dense_folder), tmp_path / "student", "S2A2E8", text=str(text_file), settings=SMALL)
    monkeypatch.setattr(FactorTrainer, "train", diverge)
    settings = HealSettings(tokens=1024, validation_tokens=256, precision="float32")
    with pytest.raises(FactorLLMError, match=r"has come out with NaN or infinity in it: the training has diverged"):
        heal(tmp_path / "student", str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", sorted(ONLY_GGML))
def test_no_block_of_ggml_overflows_silently(kind):
    """Finite and near what was put in, or refused: at every size of numbers, and where columns count unevenly."""
    uneven = np.geomspace(1e-8, 1, 512, dtype=np.float32)[None]
    held = []
    for exponent in range(-40, 100, 4):
        rows = torch.randn(4, 512, generator=torch.Generator().manual_seed(exponent)) * 2.0**exponent
        for importance in (None, uneven):
            try:
                refuse_unquantisable("name", rows, kind.name)
                made = quantize("name", rows.numpy(), kind, importance)
            except FactorLLMError:
                continue
            back = torch.from_numpy(gguf.quants.dequantize(made, kind))
            assert (back - rows).norm() < 0.75 * rows.norm()
            held.append(exponent)
    assert set(range(-8, 12, 4)) < set(held)
    assert max(held) < 40


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_numbers_that_a_gguf_type_does_not_hold_are_refused(kind):
    def holds(value: float) -> bool:
        rows = torch.zeros(2, 64)
        rows[0, 0] = -value
        try:
            refuse_unquantisable("name", rows, kind)
        except FactorLLMError:
            return False
        quantised = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
        assert np.isfinite(gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType[kind])).all()
        return True

    assert holds(6e4)
    assert not holds(1e7) or kind in ("BF16", "F32")
    for exponent in range(10, 24):
        holds(2.0**exponent)
