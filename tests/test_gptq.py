"""Rounding that makes errors good: less error on the text's inputs, in the types that llama.cpp reads."""

import itertools
from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from conftest import words
from families import TINY
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from test_export import save_model
from test_kquants import SMALL, TOKENS, seen_by_hand, tensors_in, tokens_of, wide

from factorllm import FactorLLMError, factorize
from factorllm.dense.ffn import FFN
from factorllm.exporting import export_gguf, grams
from factorllm.exporting.checkpoints import open_checkpoint
from factorllm.exporting.descent import Blocks, descend, squared_errors
from factorllm.exporting.ggml import quantize
from factorllm.exporting.gptq import LEVELS, quantize_compensated
from factorllm.exporting.grams import Grams
from factorllm.exporting.tensors import gguf_tensors
from factorllm.student.read import load_student

assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


def correlated(count: int, d: int, seed: int = 0) -> torch.Tensor:
    """Inputs (count, d) of which some directions hold most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) * torch.logspace(0, -1.5, d)
    return torch.randn(count, d, generator=generator) @ mixing.T


def lost(weights: torch.Tensor, made: np.ndarray, kind: Type, inputs: torch.Tensor) -> float:
    """Squared error of the outputs, relative to the outputs."""
    back = torch.from_numpy(gguf.quants.dequantize(made, kind)).view_as(weights)
    return (((weights - back) @ inputs.T).square().sum() / (weights @ inputs.T).square().sum()).item()


@pytest.mark.engine
@pytest.mark.parametrize("kind", LEVELS)
def test_less_is_lost_on_inputs_like_the_texts(kind):
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    seen, new = correlated(4096, 128).split(2048)
    gram = seen.T @ seen
    importance = (gram.diagonal() / gram.diagonal().mean())[None].numpy()
    plain = lost(weights, quantize("w", weights.numpy(), kind, importance), kind, new)
    assert lost(weights, quantize_compensated("w", weights.numpy(), kind, gram[None]), kind, new) < 0.5 * plain


@pytest.mark.engine
@pytest.mark.parametrize("kind", LEVELS)
def test_one_massive_input_does_not_hide_what_the_others_have_in_common(kind):
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    seen, new = correlated(4096, 128).split(2048)
    seen[:, 0] *= 1000
    new[:, 0] = 0
    gram = seen.T @ seen
    importance = (gram.diagonal() / gram.diagonal().mean())[None].numpy()
    plain = lost(weights, quantize("w", weights.numpy(), kind, importance), kind, new)
    assert lost(weights, quantize_compensated("w", weights.numpy(), kind, gram[None]), kind, new) < 0.85 * plain


@pytest.mark.engine
@pytest.mark.parametrize("kind", LEVELS)
def test_inputs_that_have_nothing_in_common_leave_the_nearest_levels(kind):
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    made = quantize_compensated("w", weights.numpy(), kind, torch.zeros(1, 64, 64))
    assert np.array_equal(made, quantize_compensated("w", weights.numpy(), kind, torch.eye(64)[None]))
    scales = torch.from_numpy(made.reshape(8, 2, 18)[..., :2].copy().view(np.float16).astype(np.float32))
    levels = scales * torch.tensor(LEVELS[kind], dtype=torch.float32)
    nearest = (weights.view(8, 2, 32, 1) - levels[:, :, None]).abs().min(-1).values
    back = torch.from_numpy(gguf.quants.dequantize(made, kind)).view(8, 2, 32)
    assert torch.allclose((weights.view(8, 2, 32) - back).abs(), nearest, atol=1e-6)


@pytest.mark.engine
@pytest.mark.parametrize("kind", LEVELS)
def test_no_row_loses_more_than_by_rounding_each_block_for_itself(kind):
    """Nearly all inputs are in one direction, so much is moved, in some rows beyond what a block's scale reaches.
    Beside it inputs have noise of half of their own power, as is taken for granted of them (`_DAMPING`)."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(64, 96, generator=generator)
    inputs = torch.randn(512, 1, generator=generator) + 0.01 * torch.randn(512, 96, generator=generator)
    gram = inputs.T @ inputs
    importance = (gram.diagonal() / gram.diagonal().mean())[None].numpy()
    plain = quantize("w", weights.numpy(), kind, importance)
    made = quantize_compensated("w", weights.numpy(), kind, gram[None])
    gram += 0.5 * gram.diagonal().diag()
    lacks = [weights - torch.from_numpy(gguf.quants.dequantize(each, kind)) for each in (made, plain)]
    errors = [((each @ gram) * each).sum(1) for each in lacks]
    assert (errors[0] <= 1.01 * errors[1]).all()
    assert (errors[0] < 0.5 * errors[1]).any()


@pytest.mark.engine
@pytest.mark.parametrize("size", [1e-17, 1e17])
def test_the_size_of_inputs_changes_nothing(size):
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).numpy()
    inputs = correlated(512, 64)
    made, wanted = (
        quantize_compensated("w", weights, Type.Q4_0, (scale * inputs.T @ (scale * inputs))[None])
        for scale in (size, 1.0)
    )
    assert (made == wanted).mean() > 0.99


@pytest.mark.parametrize("kind", LEVELS)
def test_descent_makes_no_row_worse_and_ends_where_no_code_alone_would_be_better(kind):
    weights = torch.randn(1, 8, 96, generator=torch.Generator().manual_seed(1))
    inputs = correlated(512, 96)
    gram = (inputs.T @ inputs / 512)[None]
    levels = torch.tensor(LEVELS[kind], dtype=torch.float32)
    scales = (weights.view(1, 8, 3, 32).abs().amax(-1) / levels.max()).half().float()
    codes = torch.bucketize(weights.view(1, 8, 3, 32) / scales[..., None], (levels[1:] + levels[:-1]) / 2)
    blocks = Blocks(codes, scales, levels)

    def errors() -> torch.Tensor:
        return squared_errors(blocks.weights() - weights, gram)

    found = [errors()]
    for _ in range(8):
        descend(blocks, weights, gram)
        found.append(errors())
    assert all((after <= before).all() for before, after in itertools.pairwise(found))
    assert (found[-1] < 0.7 * found[0]).all()
    assert torch.equal(found[-1], found[-2])
    for column, code in itertools.product(range(96), range(16)):
        place = (..., column // 32, column % 32)
        old = blocks.codes[place].clone()
        blocks.codes[place] = code
        assert (errors() >= found[-1] * (1 - 1e-4)).all()
        blocks.codes[place] = old


@pytest.mark.parametrize("kind", LEVELS)
def test_blocks_are_what_gguf_reads(kind):
    generator = torch.Generator().manual_seed(1)
    codes, levels = torch.randint(16, (2, 4, 3, 32), generator=generator), torch.tensor(LEVELS[kind]).float()
    blocks = Blocks(codes, torch.randn(2, 4, 3, generator=generator).half().float(), levels)
    made = blocks.bytes()
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(made, kind)), blocks.weights())
    again = Blocks.of_bytes(made, levels)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, blocks.scales)


@pytest.mark.engine
def test_each_matrix_of_a_tensor_has_inputs_of_its_own():
    weights = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    sums = torch.stack([x.T @ x for x in (correlated(512, 64, seed) for seed in (2, 3))])
    together = quantize_compensated("w", weights.numpy(), Type.Q4_0, sums)
    for number in range(2):
        alone = quantize_compensated("w", weights[number].numpy(), Type.Q4_0, sums[number, None])
        assert np.array_equal(together[number], alone)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, a student of three experts, of which one runs beside the shared part, and a text."""
    root = tmp_path_factory.mktemp("gptq")
    save_model(wide(), root / "dense")
    (root / "text.txt").write_text("\n\n".join(words(40, seed) for seed in range(400)))
    settings = SMALL.model_copy(update={"host": "glm4_moe"})
    factorize(str(root / "dense"), root / "student", "S1A1E4", text=str(root / "text.txt"), settings=settings)
    return root


def test_the_sums_are_those_of_the_models_own_inputs(models, monkeypatch):
    monkeypatch.setattr(grams, "_AT_MOST", 0)  # a layer at a time
    text = str(models / "text.txt")
    found = Grams(open_checkpoint(str(models / "student")), text, TOKENS, Console(quiet=True))
    seen = seen_by_hand(load_student(models / "student"), tokens_of(models / "student", text, SMALL))
    for layer in (1, 0):
        given = {name.split(f"layers.{layer}.")[-1]: each for name, each in seen.items() if f"layers.{layer}." in name}
        for name, module in {
            "attn_q": "self_attn.q_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
        }.items():
            inputs = given[module][0].flatten(0, -2)
            torch.testing.assert_close(
                found.of(f"blk.{layer}.{name}.weight"), (inputs.T @ inputs)[None], rtol=1e-3, atol=1e-3
            )
        hidden, picks = given["mlp.experts"][0].flatten(0, -2), given["mlp.experts"][1]
        into = found.of(f"blk.{layer}.ffn_up_exps.weight")
        assert into.shape == (3, 256, 256)
        for expert in range(3):
            own = hidden[(picks == expert).any(1)]
            assert_close(into[expert], own.T @ own)
    assert found.of("token_embd.weight") is None


def test_neurons_are_put_in_order_together(models):
    checkpoint = open_checkpoint(str(models / "student"))
    found = Grams(checkpoint, str(models / "text.txt"), TOKENS, Console(quiet=True))
    tensors = dict(gguf_tensors(checkpoint))
    x = correlated(4, 256)
    for which in ("shexp", "exps"):
        names = [f"blk.1.ffn_{part}_{which}.weight" for part in ("gate", "up", "down")]
        plain = [tensors[name].reshape(-1, *tensors[name].shape[-2:]) for name in names]
        ordered = [found.in_order(name, tensors[name]).view_as(own) for name, own in zip(names, plain, strict=True)]
        assert not torch.equal(plain[0], ordered[0])
        for number in range(len(plain[0])):
            wanted, found_ffn = (FFN(*(each[number] for each in matrices)) for matrices in (plain, ordered))
            assert_close(found_ffn.hidden(x) @ found_ffn.down.T, wanted.hidden(x) @ wanted.down.T)
        sizes = found.of(names[2]).diagonal(dim1=1, dim2=2)
        assert (sizes.diff(dim=1) <= 0).all()
    query = "blk.1.attn_q.weight"
    assert torch.equal(found.in_order(query, tensors[query]), tensors[query])


def test_a_gate_in_the_tensor_of_its_up_is_ordered_like_it(models, tmp_path):
    save_model(TINY["phi3"], tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    settings = replace(checkpoint, settings=open_checkpoint(str(models / "student")).settings)
    found, tensors = (
        Grams(settings, str(models / "text.txt"), TOKENS, Console(quiet=True)),
        dict(gguf_tensors(checkpoint)),
    )
    up, down = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
    wanted = FFN(*tensors[up].chunk(2), tensors[down])
    got = FFN(*found.in_order(up, tensors[up]).chunk(2), found.in_order(down, tensors[down]))
    x = correlated(4, wanted.gate.shape[1])
    assert not torch.equal(wanted.gate, got.gate)
    assert_close(got.hidden(x) @ got.down.T, wanted.hidden(x) @ wanted.down.T)
    assert found.of(up) is not None


@pytest.mark.engine
@pytest.mark.parametrize("name", ["dense", "student"])
def test_a_file_computes_more_nearly_what_the_model_does(name, models, tmp_path):
    from factorllm.measure.gguf_subject import GgufSubject

    text = str(models / "text.txt")
    paths = {"exact": ("f32", False), "plain": ("q4_0", False), "better": ("q4_0", True)}
    for out, (file_type, gptq) in paths.items():
        weighted = {"text": text, "tokens": 4 * TOKENS, "gptq": gptq} if file_type == "q4_0" else {}
        export_gguf(str(models / name), tmp_path / f"{out}.gguf", file_type, **weighted)
    subjects = {out: GgufSubject.of(tmp_path / f"{out}.gguf") for out in paths}
    tokens = subjects["exact"].held_out(text)[:1]
    said = {out: torch.tensor(subject.follow(tokens).logprobs) for out, subject in subjects.items()}
    better, plain = ((said[out] - said["exact"]).square().mean() for out in ("better", "plain"))
    assert better < 0.8 * plain
    kinds = {each.name: each.tensor_type for each in gguf.GGUFReader(tmp_path / "better.gguf").tensors}
    assert kinds == {each.name: each.tensor_type for each in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    assert tensors_in(tmp_path / "better.gguf").keys() == kinds.keys()


def test_what_it_cannot_do_is_refused(models, tmp_path):
    for options in ({"file_type": "q4_0"}, {"file_type": "q4_k", "text": str(models / "text.txt")}):
        with pytest.raises(FactorLLMError, match="give --text, and --type q4_0 or iq4_nl"):
            export_gguf(str(models / "dense"), tmp_path / "out.gguf", gptq=True, **options)
    assert not list(tmp_path.iterdir())
