"""K-quants and IQ4: what llama.cpp computes from them, and which input channels they keep best."""

from functools import partial
from statistics import median

import gguf
import numpy as np
import pytest
import torch
from conftest import BASE, CONFIGS, some_tokens, words
from families import TINY
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_export import PROMPTS, save_model, varied
from transformers import LlamaConfig, Qwen3Config

from factorllm import FactorLLMError, factorize
from factorllm.dense import open_model
from factorllm.engines import EngineProcess, Options
from factorllm.exporting import FILE_TYPES, export_gguf, ggml
from factorllm.exporting.checkpoints import open_checkpoint
from factorllm.exporting.ggml import ONLY_GGML, WEIGHTED, quantize
from factorllm.exporting.grams import Grams
from factorllm.exporting.importance import read_importance
from factorllm.exporting.tensors import gguf_tensors
from factorllm.runs.settings import Settings
from factorllm.student.read import load_student, read_provenance
from factorllm.text.calibration import hold_out
from factorllm.text.parts import open_text

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "initializer_range": 0.05}
SMALL = Settings(tokens=2048, held_out_tokens=512, length=64, baseline=False)
TOKENS = 1024
K_TYPES = [name for name, (kind, _) in FILE_TYPES.items() if kind in ONLY_GGML]


def wide(kind=LlamaConfig, **changes):
    """A config whose rows fill blocks of 256."""
    return kind(**BASE | WIDE | changes)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """Enough for what is held out by default, which is what is held out for a dense model."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("\n\n".join(words(40, seed) for seed in range(400)))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "dense"
    save_model(wide(), folder)
    return folder


@pytest.fixture(scope="module")
def student(dense, text_file):
    """Four experts of 256 neurons, two of which run, and one that always runs; queries and keys are not interleaved."""
    out = dense.parent / "student"
    settings = SMALL.model_copy(update={"host": "glm4_moe"})
    factorize(str(dense), out, "S1A1E4", text=str(text_file), settings=settings)
    return out


def tokens_of(model, text, settings) -> torch.Tensor:
    """The part of a text that comes after what is held out."""
    settings = settings.model_copy(update={"device": "cpu"}).resolve(open_checkpoint(str(model)).config)
    parts = open_text(str(text), open_checkpoint(str(model)).tokenizer, settings)
    hold_out(parts, settings)
    return parts.take(TOKENS // settings.length)


def tensors_in(path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


@torch.inference_mode()
def seen_by_hand(model, tokens) -> dict[str, torch.Tensor]:
    """By module and what is seen there: inputs of linear maps (n, d), and what went through the experts."""
    inputs, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("experts"):
            keep = partial(lambda name, module, given: inputs.update({name: given}), name)
            hooks.append(module.register_forward_pre_hook(keep))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.inference_mode()
def experts_by_hand(experts, hidden, picks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which tokens an expert ran for, (tokens, N), and what went into it and into its down, for all tokens."""
    ran = torch.nn.functional.one_hot(picks, len(experts.down_proj)).sum(1).double()
    if hasattr(experts, "gate_up_proj"):
        gate, up = torch.einsum("td,ehd->teh", hidden, experts.gate_up_proj).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
    else:
        inner = torch.einsum("td,ehd->teh", hidden, experts.up_proj).relu().square()
    return ran, hidden.double().square(), inner.double().square()


def log_probs(model, prompt) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt).logits[0, -1].float().log_softmax(-1)


def differences(path, *models) -> list[float]:
    """For each model the median over prompts of the largest difference to llama.cpp, among the ten likeliest tokens."""
    found = [[] for _ in models]
    with EngineProcess("llamacpp", path, Options(context=64, decode_threads=1)) as process:
        for seed in range(PROMPTS):
            prompt = some_tokens(models[0].config, rows=1, length=20 + seed, seed=seed)
            top = process.next_tokens(prompt[0].tolist(), 10)
            for model, values in zip(models, found, strict=True):
                wanted = log_probs(model, prompt)
                values.append(max(abs(wanted[token].item() - value) for token, value in top))
    return [median(values) for values in found]


ROUNDED = 0.1
"""What llama.cpp may differ by, for it takes activations in 8 bits, one scale for 256 of them: 0.03 to 0.05 here."""


@pytest.mark.engine
@pytest.mark.parametrize("file_type", K_TYPES)
def test_llamacpp_reads_what_transformers_holds(file_type, dense, long_text, tmp_path):
    out = tmp_path / "out.gguf"
    export_gguf(str(dense), out, file_type, text=str(long_text), tokens=TOKENS)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.ffn_down.weight"] is kinds["blk.1.attn_k.weight"] is FILE_TYPES[file_type][0]
    assert kinds["token_embd.weight"] is Type.Q8_0
    held, exact = (open_model(str(path)).load_model(torch.float32, torch.device("cpu")) for path in (out, dense))
    near, far = differences(out, held, exact)
    assert near < ROUNDED
    assert near < 0.5 * far or file_type in ("q6_k", "q5_k")  # whose own error is no larger than the rounding's


@pytest.mark.engine
@pytest.mark.parametrize("file_type", ["q4_k", "iq4_nl"])
def test_llamacpp_reads_the_experts_that_transformers_holds(file_type, student, text_file, tmp_path):
    out = tmp_path / "out.gguf"
    export_gguf(str(student), out, file_type, text=str(text_file), tokens=TOKENS)
    stored = {name: torch.from_numpy(data.copy()) for name, data in tensors_in(out).items()}
    near, far = differences(out, holding(student, stored), load_student(student))
    assert near < ROUNDED
    assert near < 0.5 * far


def holding(student, stored):
    """A student in transformers with the tensors of its GGUF file."""
    model = load_student(student)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(stored["token_embd.weight"])
        model.lm_head.weight.copy_(stored["output.weight"])
        for index, layer in enumerate(model.model.layers):
            part = {name.removeprefix(f"blk.{index}."): tensor for name, tensor in stored.items()}
            for letter, name in zip("qkvo", ("q", "k", "v", "output"), strict=True):
                getattr(layer.self_attn, f"{letter}_proj").weight.copy_(part[f"attn_{name}.weight"])
            gate_up = torch.cat([part["ffn_gate_exps.weight"], part["ffn_up_exps.weight"]], dim=1)
            layer.mlp.experts.gate_up_proj.copy_(gate_up)
            layer.mlp.experts.down_proj.copy_(part["ffn_down_exps.weight"])
            for name in ("gate", "up", "down"):
                getattr(layer.mlp.shared_experts, f"{name}_proj").weight.copy_(part[f"ffn_{name}_shexp.weight"])
    return model


def test_without_a_text_nothing_is_weighted_and_that_is_said(dense, tmp_path):
    said = []
    made = export_gguf(str(dense), tmp_path / "out.gguf", "q4_k", say=said.append)
    assert said == ["q4_k without importance weights; `factorllm export --text` takes them from a text"]
    assert made.importance is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert gguf.GGUFReader(made.path).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S


@pytest.mark.parametrize(
    ("file_type", "kind"),
    [("q6_k", "Q8_0"), ("q5_k", "Q5_1"), ("q4_k", "Q5_0"), ("q3_k", "IQ4_NL"), ("iq4_xs", "IQ4_NL")],
)
def test_rows_that_fill_no_block_are_reported_with_what_they_take(file_type, kind, tmp_path):
    save_model(LlamaConfig(**BASE | {"intermediate_size": 256}), tmp_path / "dense")
    said = []
    made = export_gguf(str(tmp_path / "dense"), tmp_path / "out.gguf", file_type, say=said.append)
    instead = f"tensors with such rows take {kind.lower()} instead of {file_type}"
    assert said[0] == f"the hidden size, 32, is no multiple of 256: {instead}"
    assert len(said) == 2
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made.path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == FILE_TYPES[file_type][0].name
    assert made.larger == {name: kind for name, found in kinds.items() if found == kind and name.startswith("blk.")}
    assert len(made.larger) == 3 * 6


def test_rows_of_no_block_at_all_take_f16(tmp_path, text_file, small):
    save_model(CONFIGS["mha"], tmp_path / "dense")
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)
    said = []
    made = export_gguf(str(tmp_path / "out"), tmp_path / "out.gguf", "q4_k", say=said.append)
    assert "the width of an expert, 8, is no multiple of 256: tensors with such rows take f16" in said[1]
    assert made.larger["blk.0.ffn_down_exps.weight"] == "F16"
    assert made.larger["blk.0.ffn_up_exps.weight"] == "Q5_0"


@pytest.mark.parametrize("kind", sorted(WEIGHTED))
def test_what_counts_more_is_kept_better(kind):
    chooser = np.random.default_rng(0)
    rows = chooser.standard_normal((2, 64, 512)).astype(np.float32)
    importance = np.square(chooser.standard_normal((2, 512))).astype(np.float32) + 1e-3

    def error(weights):
        back = gguf.quants.dequantize(quantize("name", rows, kind, weights), kind)
        return (importance[:, None] * np.square(back - rows)).sum()

    assert error(importance) < 0.92 * error(None)
    assert error(importance) < 0.92 * error(importance[::-1])  # each matrix has weights of its own


def test_the_errors_decide_what_stands_for_q3_k():
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    errors = {}
    for kind in (Type.IQ4_NL, Type.Q4_0):
        errors[kind] = np.square(gguf.quants.dequantize(quantize("name", rows, kind, None), kind) - rows).sum()
    assert errors[Type.IQ4_NL] < 0.85 * errors[Type.Q4_0]


def test_the_older_types_are_those_of_the_package_gguf():
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    for kind in WEIGHTED - ONLY_GGML:
        assert (quantize("name", rows, kind, None) == gguf.quants.quantize(rows, kind)).all()


@pytest.mark.parametrize("file_type", ["q4_0", "q4_k", "iq4_xs"])
def test_a_student_keeps_best_what_its_text_uses(file_type, student, text_file, tmp_path):
    export_gguf(str(student), tmp_path / "exact.gguf", "f32")
    export_gguf(str(student), tmp_path / "plain.gguf", file_type)
    export_gguf(str(student), tmp_path / "weighted.gguf", file_type, text=str(text_file), tokens=TOKENS)
    exact, plain, weighted = (tensors_in(tmp_path / f"{name}.gguf") for name in ("exact", "plain", "weighted"))
    read = tensors_in(tmp_path / "weighted.imatrix.gguf")
    matrices = [name for name, tensor in exact.items() if name.startswith("blk.") and tensor.ndim > 1]
    matrices = [name for name in matrices if "ffn_gate_inp" not in name]
    assert len(matrices) == 2 * 10
    for name in matrices:
        counts = np.maximum(read[f"{name}.counts"], 1)
        importance = (read[f"{name}.in_sum2"] / counts).reshape(-1, 1, exact[name].shape[-1])
        errors = [(importance * np.square(found[name] - exact[name])).sum() for found in (plain, weighted)]
        assert errors[1] < errors[0], name


def of_qwen3_vl(**changes):
    """Experts of 64 neurons: those of 16 would be half as wide as the stream, and refused."""
    return varied("qwen3_vl_text", **changes | {"head_dim": 16, "intermediate_size": 256})


HOSTED = [
    ("llama", LlamaConfig, "mixtral", "S0A2E4"),
    ("llama", LlamaConfig, "granitemoeshared", "S1A1E4"),
    ("llama", LlamaConfig, "qwen2_moe", "S1A1E4"),
    ("qwen3", Qwen3Config, "qwen3_moe", "S0A2E4"),
    ("qwen3", Qwen3Config, "glm4_moe", "S1A1E4"),
    ("qwen3_vl_text", of_qwen3_vl, "qwen3_vl_moe_text", "S0A2E4"),
]


@pytest.mark.parametrize(("family", "config", "host", "recipe"), HOSTED)
def test_the_importance_file_of_each_host(family, config, host, recipe, tmp_path, text_file):
    save_model(config(**BASE | {"head_dim": 8}), tmp_path / "dense")
    settings = SMALL.model_copy(update={"host": host})
    factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=settings)
    made = export_gguf(str(tmp_path / "out"), tmp_path / "out.gguf", "q4_k", text=str(text_file), tokens=TOKENS)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(made.importance).tensors}
    model = load_student(tmp_path / "out")
    inputs = seen_by_hand(model, tokens_of(tmp_path / "out", text_file, settings))
    matrices = [t for t in gguf.GGUFReader(made.path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    for tensor in matrices:
        d, experts = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
        sums, counts = read[f"{tensor.name}.in_sum2"], read[f"{tensor.name}.counts"]
        assert (list(sums.shape), list(counts.shape)) == ([d, experts], [1, experts])
        assert counts.data.sum() == (2 if experts > 1 and recipe == "S0A2E4" else 1) * TOKENS
    for index, layer in enumerate(model.model.layers):
        hidden, picks, _ = inputs[next(name for name in inputs if name.endswith("experts") and f".{index}." in name)]
        experts = next(m for m in layer.modules() if type(m).__name__.endswith("Experts"))
        ran, into, inner = experts_by_hand(experts, hidden, picks)
        for name, wanted in {
            "ffn_gate_exps": ran.T @ into,
            "ffn_up_exps": ran.T @ into,
            "ffn_down_exps": torch.einsum("te,teh->eh", ran, inner),
            "ffn_gate_inp": into.sum(0, keepdim=True),
            "attn_q": inputs[f"model.layers.{index}.self_attn.q_proj"][0].double().square().sum((0, 1))[None],
            "attn_output": inputs[f"model.layers.{index}.self_attn.o_proj"][0].double().square().sum((0, 1))[None],
        }.items():
            found = read[f"blk.{index}.{name}.weight.in_sum2"].data
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-6 * wanted.max())
        assert (read[f"blk.{index}.ffn_down_exps.weight.counts"].data[:, 0] == ran.sum(0).numpy()).all()


def test_what_goes_into_experts_without_a_gate_and_into_layers_without_an_ffn(tmp_path, text_file):
    save_model(TINY["nemotron_h"], tmp_path / "dense")
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=SMALL)
    sums = read_importance(open_checkpoint(str(tmp_path / "out")), str(text_file), TOKENS).sums
    ffn = ["ffn_gate_inp", "ffn_up_exps", "ffn_down_exps", "ffn_up_shexp", "ffn_down_shexp"]
    mamba, attention = ["ssm_in", "ssm_out"], ["attn_q", "attn_k", "attn_v", "attn_output"]
    assert sums.keys() == {
        f"blk.{index}.{name}.weight"
        for index, names in enumerate((mamba, ffn, attention, ffn, mamba))
        for name in names
    }
    model = load_student(tmp_path / "out")
    inputs = seen_by_hand(model, tokens_of(tmp_path / "out", text_file, SMALL))
    hidden, picks, _ = inputs["model.layers.3.mixer.experts"]
    ran, into, inner = experts_by_hand(model.model.layers[3].mixer.experts, hidden, picks)
    for name, wanted in (("up", ran.T @ into), ("down", torch.einsum("te,teh->eh", ran, inner))):
        torch.testing.assert_close(sums[f"blk.3.ffn_{name}_exps.weight"], wanted, rtol=1e-3, atol=1e-6)


def test_columns_that_the_file_has_in_another_order_are_weighed_in_it(tmp_path, long_text):
    """Value heads of Qwen3.5, which `ssm_out` reads."""
    save_model(TINY["qwen3_5_text"], tmp_path / "dense")
    checkpoint = open_checkpoint(str(tmp_path / "dense"))
    model, name = checkpoint.load(torch.float32, torch.device("cpu")), "blk.0.ssm_out.weight"
    matrix = model.model.layers[0].linear_attn.out_proj.weight.detach()
    order = torch.cdist(dict(gguf_tensors(checkpoint))[name].T, matrix.T).argmin(1)
    assert sorted(order.tolist()) == list(range(64)) != order.tolist()
    inputs = seen_by_hand(model, tokens_of(tmp_path / "dense", long_text, Settings()))
    seen = inputs["model.layers.0.linear_attn.out_proj"][0].flatten(0, -2)[:, order]
    sums = read_importance(checkpoint, str(long_text), TOKENS).sums[name]
    torch.testing.assert_close(sums, seen.double().square().sum(0)[None], rtol=1e-3, atol=1e-6)
    grams = Grams(checkpoint, str(long_text), TOKENS, Console(quiet=True))
    torch.testing.assert_close(grams.of(name), (seen.T @ seen)[None], rtol=1e-3, atol=1e-3)


def test_the_importance_file_is_llamacpps(dense, long_text, tmp_path):
    made = export_gguf(str(dense), tmp_path / "out.gguf", "f16", text=str(long_text), tokens=TOKENS)
    reader = gguf.GGUFReader(made.importance)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["long.txt"]
    settings = Settings()
    length = settings.resolve(open_checkpoint(str(dense)).config).length
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (TOKENS // length, length)
    assert "general.architecture" not in keys
    inputs = seen_by_hand(
        open_model(str(dense)).load_model(torch.float32, torch.device("cpu")), tokens_of(dense, long_text, settings)
    )
    read = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(read) == 2 * 2 * 7
    for name, module in {"ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj", "attn_v": "self_attn.v_proj"}.items():
        wanted = inputs[f"model.layers.1.{module}"][0].double().square().sum((0, 1)).numpy()
        np.testing.assert_allclose(read[f"blk.1.{name}.weight.in_sum2"].reshape(-1), wanted, rtol=1e-3)
        assert read[f"blk.1.{name}.weight.counts"].reshape(-1) == [TOKENS]


def test_an_expert_that_never_runs_is_weighted_by_all_tokens(student, text_file, tmp_path):
    idle = tmp_path / "idle"
    idle.mkdir()
    for path in student.iterdir():
        (idle / path.name).write_bytes(path.read_bytes())
    for path in idle.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith("layers.1.mlp.gate.e_score_correction_bias"):
                weights[name][0] = -100
        save_file(weights, path, metadata={"format": "pt"})
    said = []
    made = export_gguf(str(idle), tmp_path / "out.gguf", "q4_k", text=str(text_file), tokens=TOKENS, say=said.append)
    assert said[-1] == "experts that no token ran: 1, weighted by all tokens of their layers"
    read = tensors_in(made.importance)
    assert read["blk.1.ffn_down_exps.weight.counts"][0] == 0
    assert not read["blk.1.ffn_down_exps.weight.in_sum2"][0].any()
    importance = read_importance(open_checkpoint(str(idle)), str(text_file), TOKENS)
    model = load_student(idle)
    hidden, picks, _ = seen_by_hand(model, tokens_of(idle, text_file, Settings(**read_provenance(idle)["settings"])))[
        "model.layers.1.mlp.experts"
    ]
    _, into, inner = experts_by_hand(model.model.layers[1].mlp.experts, hidden, picks)
    for name, wanted in (("ffn_up_exps", into.mean(0)), ("ffn_down_exps", inner[:, 0].mean(0))):
        found = importance.weights(f"blk.1.{name}.weight")
        np.testing.assert_allclose(found[0], (wanted / wanted.mean()).numpy(), rtol=1e-3)
        assert (found > 0).all()


def test_channels_that_nothing_comes_through_are_still_written(tmp_path, long_text):
    """Their importance is 0, of which ggml would make a block of zeros."""
    save_model(wide(), tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith("layers.0.mlp.up_proj.weight"):
            weights[name][:512] = 0
        if name.endswith("layers.1.mlp.up_proj.weight"):
            weights[name][:] = 0
    save_file(weights, path, metadata={"format": "pt"})
    export_gguf(str(tmp_path / "dense"), tmp_path / "exact.gguf", "f32")
    for file_type in [*K_TYPES, "q4_0", "q5_1"]:
        out = tmp_path / f"{file_type}.gguf"
        export_gguf(str(tmp_path / "dense"), out, file_type, text=str(long_text), tokens=128)
        exact, made = tensors_in(tmp_path / "exact.gguf"), tensors_in(out)
        for name in ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"):
            lost = np.linalg.norm((made[name] - exact[name])[:, :512]) / np.linalg.norm(exact[name][:, :512])
            assert lost < 0.25, (file_type, name)


def test_the_top_k_of_the_export_is_the_one_that_is_weighted(student, text_file, tmp_path):
    made = export_gguf(str(student), tmp_path / "out.gguf", "q4_k", text=str(text_file), tokens=TOKENS, top_k=2)
    assert tensors_in(made.importance)["blk.0.ffn_up_exps.weight.counts"].sum() == 2 * TOKENS


def test_a_weighted_export_that_is_done_is_not_repeated(dense, long_text, tmp_path):
    out, said = tmp_path / "out.gguf", []
    options = {"text": str(long_text), "tokens": TOKENS, "say": said.append}
    first = export_gguf(str(dense), out, "q4_k", **options)
    assert said == ["weighted by 1,024 tokens of long.txt"]
    made = first.path.read_bytes(), first.importance.read_bytes()
    assert str(long_text.parent).encode() not in made[0] + made[1]
    first.importance.unlink()
    again = export_gguf(str(dense), out, "q4_k", **options)
    assert (again.path.read_bytes(), again.importance.read_bytes()) == made
    assert export_gguf(str(dense), out, "q4_k", **options, weigh=None).importance == first.importance
    assert said[-1].startswith("done already")
    with pytest.raises(FactorLLMError, match=r"made with other tokens \(1024, now 2048\).* add --overwrite"):
        export_gguf(str(dense), out, "q4_k", text=str(long_text), tokens=2048)


def test_a_file_of_the_user_is_not_replaced_by_the_importance(dense, text_file, tmp_path):
    (tmp_path / "out.imatrix.gguf").write_text("mine")
    with pytest.raises(FactorLLMError, match=r"out\.imatrix\.gguf exists already and is not a GGUF file"):
        export_gguf(str(dense), tmp_path / "out.gguf", "q4_k", text=str(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["out.imatrix.gguf"]


def test_a_text_too_short_is_refused(dense, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(FactorLLMError, match="the text is too short"):
        export_gguf(str(dense), tmp_path / "out.gguf", "q4_k", text=str(tmp_path / "short.txt"))
    assert list(tmp_path.glob("out*")) == []


def test_activations_that_are_not_finite_are_refused(tmp_path, long_text):
    save_model(wide(), tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    weights = {name: tensor * (1e30 if "up_proj" in name else 1) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FactorLLMError, match=r"computes NaN or infinity on .* export without --text"):
        export_gguf(str(tmp_path / "dense"), tmp_path / "out.gguf", "q8_0", text=str(long_text), tokens=128)
    assert list(tmp_path.glob("out*")) == []


def test_without_llamacpp_it_says_how_to_install_it(dense, text_file, tmp_path, monkeypatch):
    ggml._library.cache_clear()
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    for options in ({"file_type": "q4_k"}, {"file_type": "q4_0", "text": str(text_file)}):
        with pytest.raises(FactorLLMError, match=r"is not installed; pip install 'factorllm\[llamacpp\]'"):
            export_gguf(str(dense), tmp_path / "out.gguf", **options)
    export_gguf(str(dense), tmp_path / "out.gguf", "q4_0")


def test_an_xllamacpp_without_the_quantiser_is_refused(dense, tmp_path, monkeypatch):
    ggml._library.cache_clear()
    (tmp_path / "xllamacpp.abi3.so").write_text("no library")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(ggml, "find_spec", lambda name: spec)
    with pytest.raises(FactorLLMError, match="pip install -U xllamacpp"):
        export_gguf(str(dense), tmp_path / "out.gguf", "q4_k")
