"""`heal --quantize`: the student runs as its file will, and its weights learn exactly."""

import shutil
import time
from threading import Event

import gguf
import numpy as np
import pytest
import torch
from conftest import CONFIGS
from families import TINY
from test_export import factorized, save_model
from test_heal import changed, losses, told
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from factorllm import FactorLLMError, export
from factorllm.exporting.checkpoints import open_checkpoint
from factorllm.exporting.rounded import as_in_file, types_in_file
from factorllm.exporting.tensors import gguf_tensors
from factorllm.healing.rounding import Rounding
from factorllm.healing.run import heal
from factorllm.healing.settings import HealSettings
from factorllm.healing.trainer import BestCallback
from factorllm.runs.settings import Settings
from factorllm.student.read import load_student

pytestmark = pytest.mark.engine

MADE_WITH = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)
AS_FILE = HealSettings(
    tokens=1024, validation_tokens=256, batch=4, evaluations=4, learning_rate=5e-4, precision="float32", quantize="q4_0"
)


def student_of(name: str, folder, text_file, **options):
    """Of a model whose experts have rows of a whole block, 32."""
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"intermediate_size": 256})
    return factorized(config, folder, text_file, MADE_WITH, **options)


@pytest.fixture(scope="module")
def student(text_file, tmp_path_factory):
    return student_of("gqa-tied", tmp_path_factory.mktemp("rounding"), text_file)


def healed(student, text_file, out, **changes):
    settings = AS_FILE.model_copy(update=changes)
    heal(student, str(student.parent / "dense"), out, text=str(text_file), settings=settings)
    return out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gqa-tied", {"host": "granitemoeshared"}),
        ("qwen2", {"host": "qwen2_moe"}),
        ("gqa-untied", {"recipe": "S4A0E8"}),
    ],
)
def test_weights_are_rounded_as_the_file_has_them(name, options, text_file, tmp_path):
    out = student_of(name, tmp_path, text_file, **options)
    checkpoint = open_checkpoint(str(out))
    model = checkpoint.load(torch.float32, torch.device("cpu"))
    for file_type in ("q8_0", "q4_k", "q4_0", "iq4_nl", "bf16"):
        file = export(str(out), tmp_path / f"{file_type}.gguf", file_type).path
        held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for name, parameter, kind, columns in types_in_file(model, checkpoint, file_type):
            assert held[name].tensor_type == kind
            wanted = gguf.quants.dequantize(held[name].data, kind)
            got = as_in_file(name, parameter.data, kind, columns).numpy()
            if len(got.flatten()) == 2 * len(wanted.flatten()):
                got = got[..., got.shape[-2] // 2 :, :]  # of gate and up, which are one
            if name.endswith(("attn_q.weight", "attn_k.weight")):  # some are written with their rows in another order
                got, wanted = (rows[np.lexsort(rows.T)] for rows in (got, wanted))
            assert np.array_equal(got, wanted.reshape(got.shape)), (file_type, name)
            assert file_type == "bf16" or not np.array_equal(got, parameter.data.numpy())


def test_blocks_are_of_the_columns_that_the_file_has_together(tmp_path):
    """Value heads of Qwen3.5 have 16 columns each, stand in another order in the file, and two of them are a block."""
    save_model(TINY["qwen3_5_text"], tmp_path / "dense")
    checkpoint, name = open_checkpoint(str(tmp_path / "dense")), "blk.0.ssm_out.weight"
    model = checkpoint.load(torch.float32, torch.device("cpu"))
    file = export(str(tmp_path / "dense"), tmp_path / "q4_0.gguf", "q4_0").path
    held = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    matrix = next(matrix for matrix in types_in_file(model, checkpoint, "q4_0") if matrix.name == name)
    order = torch.cdist(dict(gguf_tensors(checkpoint))[name].T, matrix.parameter.detach().T).argmin(1)
    Rounding([matrix]).begin()
    rounded = matrix.parameter.detach()[:, order].numpy()
    assert np.array_equal(rounded, gguf.quants.dequantize(held.data, held.tensor_type))


def test_the_student_is_measured_and_taught_as_its_file(student, text_file, tmp_path):
    """A copy that holds the rounded weights starts where the student does that is rounded."""
    out = healed(student, text_file, tmp_path / "out")
    assert losses(out, "eval_loss")[-1] < 0.97 * losses(out, "eval_loss")[0]
    assert told(out)["outcome"].startswith("KL of q4_0 weights to the teacher on validation text: ")

    copy = student.parent / "rounded"
    shutil.copytree(student, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = load_student(student)
    Rounding.of(model, student, "q4_0").begin()
    model.save_pretrained(copy)
    plain = healed(copy, text_file, tmp_path / "plain", quantize=None)
    assert losses(out, "eval_loss")[0] == pytest.approx(losses(plain, "eval_loss")[0], rel=1e-5)
    exact = healed(student, text_file, tmp_path / "exact", quantize=None)
    assert losses(exact, "eval_loss")[0] != pytest.approx(losses(plain, "eval_loss")[0], rel=1e-3)


def test_what_does_not_learn_is_written_as_it_was(student, text_file, tmp_path):
    out = healed(student, text_file, tmp_path / "out", train="ffn")
    assert changed(student, out)
    assert not [name for name in changed(student, out) if "self_attn" in name or "embed_tokens" in name]


def test_checkpoints_hold_the_exact_weights(student, text_file, tmp_path):
    """A run that goes on from one ends with the same bytes, however late the copy is that is written."""

    def late(stager, state):
        rounded.clear()
        rounded.wait(0.1)
        return stage(stager, state)

    def begin_and_wait(rounding):
        begin(rounding)
        rounded.set()
        time.sleep(0.05)

    def broken_off(callback, arguments, state, control, **more):
        if state.global_step >= 2:
            raise InterruptedError
        return evaluated(callback, arguments, state, control, **more)

    evaluated, stage, begin = BestCallback.on_evaluate, BlockingAsyncStager.stage, Rounding.begin
    rounded = Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockingAsyncStager, "stage", late)
        patch.setattr(Rounding, "begin", begin_and_wait)
        patch.setattr(BestCallback, "on_evaluate", broken_off)
        with pytest.raises(InterruptedError):
            healed(student, text_file, tmp_path / "broken")
    for name in ("broken", "whole"):
        healed(student, text_file, tmp_path / name)
    assert not changed(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "environment", "said"),
    [
        ({"quantize": "q2_k"}, {}, "no type 'q2_k'"),
        ({"train": "lora"}, {}, "use --train all or ffn"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "heal in one process, or in several without them"),
    ],
)
def test_what_cannot_be_rounded_is_refused(changes, environment, said, student, text_file, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FactorLLMError, match=said):
        healed(student, text_file, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
