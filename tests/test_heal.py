"""Healing: what learns and what does not, one result however the work is spread or interrupted, one architecture."""

import gc
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from conftest import CONFIGS, relative_error, save_dense, some_tokens
from families import TINY
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_export import check_no_worse, save_model
from torch.nn.functional import kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, NemotronHConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from factorllm import FactorLLMError, Recipe, factorize
from factorllm.convert.route import pa_loss
from factorllm.dense import open_model
from factorllm.dense.safetensors import TensorFolder
from factorllm.healing import rate, run
from factorllm.healing.experts import _padded, use_autocast
from factorllm.healing.job import open_heal_job
from factorllm.healing.losses import balance_loss, hidden_loss, kd_loss, label_loss, matched_streams, top_log_probs
from factorllm.healing.mor1e import lora_config
from factorllm.healing.outcome import Outcome
from factorllm.healing.rate import FRACTION, STEPS, choose, typical_weight
from factorllm.healing.run import _ask_teacher, heal
from factorllm.healing.settings import HealSettings, usual_rate
from factorllm.healing.students import set_learning, with_adapters_of
from factorllm.healing.trainer import SKIPPED, BestCallback, FactorTrainer
from factorllm.healing.training import common_arguments, new_trainer
from factorllm.hosts import choose_host
from factorllm.measure.perplexity import perplexity
from factorllm.recipe import Shape, parse_recipe
from factorllm.report.terminal import show_healed
from factorllm.runs.settings import Settings
from factorllm.student.read import load_student
from factorllm.student.routers import Routers, is_router
from factorllm.text import read_calibration_text

MADE_WITH = Settings(tokens=4096, held_out_tokens=512, length=64, baseline=False)
QUICK = HealSettings(
    tokens=4096, validation_tokens=512, batch=4, micro_batch=2, evaluations=4, learning_rate=5e-4, precision="float32"
)


def told(folder) -> dict:
    return json.loads((folder / "factorllm.json").read_text())["healing"]


def curve(folder) -> list[dict]:
    return told(folder)["curve"]


def losses(folder, name: str) -> list[float]:
    return [entry[name] for entry in curve(folder) if name in entry]


@pytest.fixture
def cheap(monkeypatch):
    """Finding a rate is worth its work, however few the tokens."""
    monkeypatch.setattr(rate, "_SHARE", math.inf)


@pytest.fixture(scope="module")
def student(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=MADE_WITH)
    return out


@pytest.fixture(scope="module")
def healed(student, dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "healed"
    heal(student, str(dense_folder), out, text=str(text_file), settings=QUICK)
    return out


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def changed(before, after) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_the_kd_loss_falls_and_the_architecture_stays(student, healed):
    validation = losses(healed, "eval_loss")
    assert validation[-1] < 0.97 * validation[0]
    assert json.loads((student / "config.json").read_text()) == json.loads((healed / "config.json").read_text())
    assert {n: (t.shape, t.dtype) for n, t in tensors(student).items()} == {
        n: (t.shape, t.dtype) for n, t in tensors(healed).items()
    }


def test_what_the_caller_has_set_of_torch_changes_nothing_and_stays(student, healed, dense_folder, text_file, tmp_path):
    text = str(text_file)
    torch.set_default_dtype(torch.bfloat16)
    before, drawn = torch.get_rng_state(), random.getstate()
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            factorize(str(dense_folder), tmp_path / "student", "S2A2E8", text=text, settings=MADE_WITH)
            heal(student, str(dense_folder), tmp_path / "healed", text=text, settings=QUICK)
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_default_device().type == "meta"
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == drawn
    assert not changed(student, tmp_path / "student")
    assert not changed(healed, tmp_path / "healed")


def test_threads_wait_for_each_other(student, dense_folder, text_file, tmp_path):
    """transformers is of no use to two at once: a tied head was missed, as if its model were incomplete."""

    def make(number: int) -> Path:
        out = tmp_path / str(number)
        factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=MADE_WITH)
        return out

    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(make, range(2)):
            assert not changed(student, out)


def test_a_trainer_is_gone_before_others_are_loaded(student, dense_folder, text_file, tmp_path, monkeypatch):
    alive, measure = [], run._measure

    def measured(*arguments):
        alive.extend(each for each in gc.get_objects() if isinstance(each, FactorTrainer))
        return measure(*arguments)

    monkeypatch.setattr(run, "_measure", measured)
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=QUICK)
    assert not alive


def test_each_token_is_trained_on_in_each_epoch(student, dense_folder, text_file, tmp_path, monkeypatch):
    """Seven sequences are asked for, which are one batch of four and no whole second one."""
    step, seen = FactorTrainer.training_step, Counter()

    def counting(trainer, model, inputs, *more):
        seen.update(map(tuple, inputs["input_ids"].tolist()))
        return step(trainer, model, inputs, *more)

    monkeypatch.setattr(FactorTrainer, "training_step", counting)
    settings = HealSettings(tokens=7 * 64, validation_tokens=128, batch=4, epochs=3, evaluations=1, learning_rate=1e-5)
    found = heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    assert list(seen.values()) == [3] * 4
    assert found.tokens == 4 * 64


def test_the_pa_loss_falls(dense_folder, text_file, tmp_path):
    recipe = Recipe(shared=2, active=2, parts=8, router="random")
    factorize(str(dense_folder), tmp_path / "student", recipe, text=str(text_file), settings=MADE_WITH)
    settings = QUICK.model_copy(update={"train": "router", "pa_weight": 10.0, "learning_rate": 0.02})
    heal(tmp_path / "student", str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    values = losses(tmp_path / "out", "pa")
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_reaches_the_experts(student, device):
    model, dtypes, gradients = load_student(student), set(), []
    use_autocast(model, torch.device(device))  # no tensor need be there
    routed = {}  # both passes route as the first one: rounding would tip a token to another expert
    for router in Routers(model).modules:
        router.register_forward_hook(lambda m, _, out: routed.setdefault(m, tuple(part.detach() for part in out)))
    sizes = {parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func) and args[1].numel() in sizes:
                dtypes.add(args[1].dtype)
            return func(*args, **(kwargs or {}))

    tokens = some_tokens(model.config)
    for enabled in (False, True):
        with Products(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(tokens, labels=tokens).loss.backward()
        assert dtypes == {torch.bfloat16 if enabled else torch.float32}
        dtypes.clear()
        experts = [p.grad.flatten() for name, p in model.named_parameters() if ".experts." in name]
        assert len(experts) == 2 * model.config.num_hidden_layers
        gradients.append(torch.cat(experts))
        model.zero_grad()
    assert gradients[1].dtype == torch.float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_experts_without_a_gate_are_padded_too():
    experts = NemotronHExperts(NemotronHConfig(hidden_size=32, n_routed_experts=4, moe_intermediate_size=16))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    hidden, picks, gates = torch.randn(70, 32), torch.randn(70, 4).topk(2).indices, torch.rand(70, 2)
    assert relative_error(_padded(experts, hidden, picks, gates), experts(hidden, picks, gates)) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top", [4, 64])
def test_the_gradient_of_the_kd_loss_is_that_of_its_formula(temperature, top):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(3, 100, 200, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    ids, log_probs = top_log_probs(teacher, top, temperature)

    scaled = (student / temperature).log_softmax(-1).gather(-1, ids)
    known, wanted = scaled.exp(), log_probs.double().exp()
    rest, wanted_rest = 1 - known.sum(-1), 1 - wanted.sum(-1)
    terms = (wanted * (wanted.log() - scaled)).sum(-1) + wanted_rest * (wanted_rest / rest).log()
    divergence = terms.mean() * temperature**2

    found = kd_loss(student, ids, log_probs, temperature)
    assert found.item() == pytest.approx(divergence.item(), rel=1e-5)
    by_formula, by_autograd = (torch.autograd.grad(value, student)[0] for value in (found, divergence))
    assert relative_error(by_formula, by_autograd) < 1e-5


@pytest.mark.parametrize("term", ["label", "hidden"])
def test_the_optional_terms_fall(term, student, dense_folder, text_file, tmp_path):
    settings = QUICK.model_copy(update={f"{term}_weight": 3.0, "hidden_layers": 2, "epochs": 2})
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    values = losses(tmp_path / "out", term)
    assert values[-1] < 0.97 * values[0]


def test_the_healed_checkpoint_reloads_to_the_same_logits(student, healed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    tokens = some_tokens(model.config)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_before_and_after_are_measured_on_the_text_that_was_held_out_before(student, healed, dense_folder, text_file):
    before = json.loads((student / "factorllm.json").read_text())["results"]
    after = json.loads((healed / "factorllm.json").read_text())["results"]
    for name in ("dense", "student"):
        assert after[name]["perplexity"] == pytest.approx(before[name]["perplexity"])
    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    held_out = calibration_text(dense_folder, text_file).held_out
    assert after["healed"]["perplexity"] == pytest.approx(perplexity(model, held_out))


def calibration_text(dense_folder, text_file, settings=MADE_WITH):
    return read_calibration_text(str(text_file), open_model(str(dense_folder)).tokenizer(), settings)


def opened(student, dense_folder, text, out, settings=QUICK, console=None) -> dict[str, torch.Tensor]:
    text = None if text is None else str(text)
    with open_heal_job(student, str(dense_folder), out, text, settings, False, console) as job:
        return dict(job.text)


def rows_of(tokens) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


def test_text_to_heal_on_is_neither_calibrated_on_nor_held_out(student, dense_folder, text_file, tmp_path):
    found = opened(student, dense_folder, text_file, tmp_path / "out")
    text = calibration_text(dense_folder, text_file)
    assert torch.equal(found["held_out"], text.held_out)
    rows = {part: rows_of(tokens) for part, tokens in found.items()}
    calibration = rows_of(text.calibration)
    assert not calibration & (rows["train"] | rows["validation"])
    assert not rows["held_out"] & (rows["train"] | rows["validation"])
    assert not rows["train"] & rows["validation"]


@pytest.mark.parametrize("same_text", [True, False])
def test_no_document_is_in_two_parts_of_the_text_to_heal_on(same_text, dense_folder, tmp_path):
    """Documents much longer than a sequence, each of one letter."""
    texts = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, letters in zip(texts, ("abcdefghijkl", "nopqrstuvwxyz"), strict=True):
        path.write_text("".join(json.dumps({"text": letter * 900}) + "\n" for letter in letters))
    made_with = MADE_WITH.model_copy(update={"tokens": 2048})
    factorize(str(dense_folder), tmp_path / "student", "S2A2E8", text=str(texts[0]), settings=made_with)
    settings = QUICK.model_copy(update={"tokens": 2048})
    found = opened(tmp_path / "student", dense_folder, texts[0 if same_text else 1], tmp_path / "out", settings)
    documents = {part: set(tokens.flatten().tolist()) - {257} for part, tokens in found.items()}
    assert not documents["held_out"] & documents["train"]
    assert not documents["validation"] & (documents["held_out"] | documents["train"])
    calibrated = calibration_text(dense_folder, texts[0], made_with)
    assert not documents["validation"] & set(calibrated.calibration.flatten().tolist()) - {257}
    assert torch.equal(found["held_out"], calibrated.held_out) == same_text


def test_one_document_is_cut_for_healing_too_and_that_is_said(dense_folder, tmp_path):
    book, console = tmp_path / "book.txt", Console(record=True, width=200, file=io.StringIO())
    book.write_text("".join(chr(200 + number % 50) * 32 for number in range(500)))
    factorize(str(dense_folder), tmp_path / "student", "S2A2E8", text=str(book), settings=MADE_WITH)
    found = opened(tmp_path / "student", dense_folder, book, tmp_path / "out", QUICK, console)
    assert torch.equal(found["held_out"], calibration_text(dense_folder, book).held_out)
    assert len(found["validation"]) == 8
    assert len(found["train"]) == 64
    assert "parts of one and the same are learned from and measured on" in " ".join(console.export_text().split())


def test_where_new_text_ends_healing_takes_the_calibration_text(student, dense_folder, text_file, tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    wanted = text_file.stat().st_size // 128 * 128 - 3072  # batches; about half of the calibration text is needed
    most = QUICK.model_copy(update={"tokens": wanted})
    train = opened(student, dense_folder, text_file, tmp_path / "out", most, console)["train"]
    calibrated = calibration_text(dense_folder, text_file).calibration
    again = int(re.search("([0-9,]+) of the tokens to heal on are", console.export_text())[1].replace(",", "")) // 64
    assert 0 < again < len(calibrated)
    assert len(train) == wanted // 64
    assert torch.equal(train[-again:], calibrated[:again])
    assert not rows_of(train[:-again]) & rows_of(calibrated)


def test_text_that_is_sampled_to_validate_on_was_not_calibrated_on(dense_folder, tmp_path):
    made_with = MADE_WITH.model_copy(update={"tokens": 512})
    factorize(str(dense_folder), tmp_path / "student", "S2A2E8", settings=made_with)
    found = opened(tmp_path / "student", dense_folder, None, tmp_path / "out", QUICK.model_copy(update={"tokens": 512}))
    source = open_model(str(dense_folder))
    text = read_calibration_text(
        None, source.tokenizer(), made_with, load_model=lambda: source.load_model(torch.float32, torch.device("cpu"))
    )
    assert torch.equal(found["held_out"], text.held_out)
    assert not rows_of(found["validation"]) & rows_of(text.calibration)
    assert not rows_of(found["validation"]) & rows_of(found["train"])


@pytest.mark.parametrize("gates", ["straight-through", "soft"])
def test_the_router_has_a_gradient_from_every_term(student, gates):
    settings = HealSettings(gates=gates, precision="float32")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    routers = Routers(model)
    if gates == "soft":
        routers.unflatten()
    set_learning(model, settings)
    tokens = some_tokens(model.config)
    logits = model(tokens).logits
    ids, log_probs = top_log_probs(torch.randn_like(logits), 16, 1.0)
    picked = routers.logits(gates == "soft")
    prior = torch.rand_like(picked).softmax(-1)
    terms = {
        "kd": kd_loss(logits, ids, log_probs),
        "pa": pa_loss(picked.flatten(0, 1), prior.flatten(0, 1)),
        "balance": balance_loss(picked.transpose(0, 1), routers.top_k),
    }
    weights = [module.weight for module in routers.modules]
    assert len(weights) == model.config.num_hidden_layers
    for name, term in terms.items():
        for gradient in torch.autograd.grad(term, weights, retain_graph=True):
            assert gradient.abs().max() > 1e-7, name


@pytest.mark.parametrize("train", ["router", "experts", "ffn", "lora"])
def test_what_is_frozen_does_not_change(train, student, dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Outcome, "gained", True)  # where nothing is, the student is written as it was
    little = {"tokens": 1024, "evaluations": 1, "pa_weight": 1.0, "learning_rate": 1e-4}
    settings = QUICK.model_copy(update={"train": train, **little})
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    names = changed(student, tmp_path / "out")
    routers = {name for name in names if is_router(name) or "router" in name}
    attention = {name for name in names if "self_attn" in name}
    assert bool(routers) == (train != "lora")
    assert bool(attention) == (train == "lora")
    if train == "router":
        assert names == routers
    else:
        assert names > routers | attention
    assert not any("embed" in name or "norm" in name for name in names)
    if train == "experts":
        assert not any("shared" in name for name in names)


def adapted(family: str, host: str, shape: Shape, train: str) -> tuple[set[str], set[str], set[str]]:
    """The linear layers of a student, those with an adapter, and the parameters of others that have one."""
    config = choose_host(host, TINY[family], shape).config(TINY[family], shape)
    model = AutoModelForCausalLM.from_config(config)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if train == "lora":
        learner = set_learning(model, QUICK.model_copy(update={"train": "lora"}))
    else:
        learner = with_adapters_of(model, lora_config(model, 4))
    found = {name for name in linear if hasattr(learner.get_submodule(f"base_model.model.{name}"), "lora_A")}
    return linear, found, set(learner.peft_config["default"].target_parameters or ())


@pytest.mark.parametrize("train", ["lora", "mor1e"])
@pytest.mark.parametrize(
    ("family", "host"),
    [("llama", "glm4_moe"), ("ernie4_5", "auto"), ("cohere2", "auto"), ("hunyuan_v1_dense", "auto"), ("qwen2", "auto")],
)
def test_adapters_are_where_they_are_said_to_be(family, host, train):
    """peft takes a shared expert's `gate_proj` for those of the routed ones. An FFN that is whole has only LoRA's."""
    shape = Shape(64, 16, 3, 16, 1, leading_dense=int(host == "glm4_moe" and train == "lora"))
    linear, found, parameters = adapted(family, host, shape, train)
    assert found == {name for name in linear if name.endswith("_proj")}
    assert parameters == ({"experts.gate_up_proj", "experts.down_proj"} if train == "lora" else set())


@pytest.mark.parametrize("train", ["lora", "mor1e"])
@pytest.mark.parametrize(
    ("family", "shape"), [("gemma4_text", Shape(64, 0, 4, 16, 2)), ("hunyuan_v1_dense", Shape(64, 16, 3, 16, 1))]
)
def test_routers_that_are_linear_layers_have_no_adapters(family, shape, train):
    """A step of an adapter would be a thousand times as large as their weights bear."""
    linear, found, _ = adapted(family, "auto", shape, train)
    routers = {name for name in linear if is_router(f"{name}.weight")}
    assert len(routers) == 3
    assert not found & routers


def test_attention_that_is_called_a_mixer_has_an_adapter_for_each_kind():
    linear, found, _ = adapted("nemotron_h", "auto", Shape(64, 16, 3, 16, 1), "mor1e")
    attention = {f"model.layers.2.mixer.{name}_proj" for name in "qkvo"}
    assert attention <= linear
    assert found == attention | {name for name in linear if "shared_experts" in name}


def test_a_static_prune_heals_too(dense_folder, text_file, tmp_path):
    factorize(str(dense_folder), tmp_path / "prune", "S4A0E8", text=str(text_file), settings=MADE_WITH)
    heal(tmp_path / "prune", str(dense_folder), tmp_path / "out", text=str(text_file), settings=QUICK)
    validation = losses(tmp_path / "out", "eval_loss")
    assert validation[-1] < validation[0]
    settings = QUICK.model_copy(update={"train": "router"})
    with pytest.raises(FactorLLMError, match="static prune has no router"):
        heal(tmp_path / "prune", str(dense_folder), tmp_path / "no", text=str(text_file), settings=settings)


@pytest.mark.parametrize(
    ("family", "recipe", "more"),
    [
        ("seed_oss", "S2A2E8", {}),  # its own config says a tenth
        ("seed_oss", "S4A0E8", {}),
        ("stablelm", "S4A0E8", {"hidden_dropout": 0.1}),
    ],
)
def test_what_learns_is_the_whole_student_and_its_config_stays(family, recipe, more, text_file, tmp_path):
    """Dropout would train others, of which the teacher says nothing."""
    save_dense(type(TINY[family]).from_dict(TINY[family].to_dict() | more), tmp_path / "dense")
    made_with = MADE_WITH.model_copy(update={"tokens": 1024})
    factorize(str(tmp_path / "dense"), tmp_path / "student", recipe, text=str(text_file), settings=made_with)
    settings, given = QUICK.model_copy(update={"tokens": 1024}), (tmp_path / "student", str(tmp_path / "dense"))
    with open_heal_job(*given, tmp_path / "out", str(text_file), settings, False, None) as job:
        targets = _ask_teacher(job)
        arguments = common_arguments(job, 1e-3, 1, "probe", save_strategy="no", report_to=[])
        trainer = new_trainer(job, arguments, targets["train"], targets["validation"])
    tokens = some_tokens(trainer.model.config)
    with torch.no_grad():
        assert torch.equal(trainer.model.train()(tokens).logits, load_student(tmp_path / "student")(tokens).logits)
    said = json.loads((tmp_path / "student/config.json").read_text())
    drops = {key for key in said if key.endswith("dropout")}
    assert max(said[key] for key in drops) == 0.1
    assert {key: getattr(trainer.model.config, key) for key in drops} == {key: said[key] for key in drops}


@pytest.mark.parametrize("gates", ["straight-through", "all-experts"])
def test_overlapping_experts_heal_too(gates, dense_folder, text_file, tmp_path):
    """With one expert a token its gate weight is 1, so the router learns from the prior, or from all experts."""
    factorize(str(dense_folder), tmp_path / "student", "S0A2E4N3", text=str(text_file), settings=MADE_WITH)
    settings = QUICK.model_copy(update={"learning_rate": 2e-4, "gates": gates})
    heal(tmp_path / "student", str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    validation = losses(tmp_path / "out", "eval_loss")
    assert validation[-1] < validation[0]
    assert any(is_router(name) for name in changed(tmp_path / "student", tmp_path / "out"))


def test_soft_gates_are_kept_only_where_they_are_better_and_stay_what_they_are(
    student, dense_folder, text_file, tmp_path
):
    def soft(before, name: str, **changes) -> Path:
        settings = QUICK.model_copy(update={"gates": "soft"} | changes)
        heal(before, str(dense_folder), tmp_path / name, text=str(text_file), settings=settings)
        return tmp_path / name

    assert not changed(student, soft(student, "worse", learning_rate=1e-9))  # its gates became others all the same
    better = soft(student, "better", epochs=4, patience=100)
    assert told(better)["best_step"] > 0
    again = soft(better, "again", learning_rate=1e-9)
    assert losses(again, "eval_loss")[0] == pytest.approx(min(losses(better, "eval_loss")), rel=1e-4)
    with pytest.raises(FactorLLMError, match="use --gates soft"):
        soft(again, "nearly binary", gates="straight-through")
    with pytest.raises(FactorLLMError, match="adapters of another student"):
        soft(student, "adapters", train="mor1e")


# What a process of its own is told, and the same settings for this one.
OPTIONS = ["--batch", "4", "--tokens", "2048", "--epochs", "2", "--learning-rate", "0.0005", "--precision", "float32"]
SAME = HealSettings(tokens=2048, epochs=2, batch=4, learning_rate=5e-4, precision="float32")


def command(student, dense_folder, text_file, out) -> list[str]:
    words = ["heal", student, "--teacher", dense_folder, "--text", text_file, "-o", out, *OPTIONS]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def healed_alone(student, dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "healed"
    settings = SAME.model_copy(update={"micro_batch": 4})
    heal(student, str(dense_folder), out, text=str(text_file), settings=settings)
    assert told(out)["best_step"] > 0  # else there is nothing to compare
    return out


def run_as_on_gpus(words: list[str]) -> None:
    import cpus_as_gpus  # noqa: F401  changes accelerate in the process that is forked, not in this one

    forked.run_main(words)


def sharded(*words: str, run: Callable[[list[str]], None] = run_as_on_gpus) -> subprocess.CompletedProcess:
    """`factorllm` in two processes that share each weight, which `accelerate launch` starts."""
    config = Path(__file__).parents[1] / "configs/fsdp2.yaml"
    options = ["--num_processes", "2", "--config_file", config, "--mixed_precision", "bf16"]  # --precision must win
    with forked.program(run) as folder:
        launch = [sys.executable, "-m", "accelerate.commands.launch", *options, folder / "factorllm", *words]
        return subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "start",
    [pytest.param(forked.both, id="ddp"), pytest.param(sharded, id="fsdp2", marks=pytest.mark.slow)],
)
def test_two_processes_equal_one(start, healed_alone, student, dense_folder, text_file, tmp_path):
    done = start(*command(student, dense_folder, text_file, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert "2 processes share" in done.stdout
    for name in ("kd", "pa", "eval_loss"):
        assert losses(healed_alone, name) == pytest.approx(losses(tmp_path / "two", name), rel=1e-4)
    one, two = tensors(healed_alone), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max(relative_error(two[name].float(), one[name].float()) for name in one) < 1e-2


FOUND = SAME.model_copy(update={"learning_rate": None})


def find_the_rate(words: list[str]) -> None:
    rate._SHARE = math.inf
    forked.run_main(words)


def find_the_rate_as_on_gpus(words: list[str]) -> None:
    rate._SHARE = math.inf
    run_as_on_gpus(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(partial(forked.both, run=find_the_rate), id="ddp"),
        pytest.param(partial(sharded, run=find_the_rate_as_on_gpus), id="fsdp2"),
    ],
)
def test_two_processes_find_the_rate_of_one(start, cheap, student, dense_folder, text_file, tmp_path):
    line = command(student, dense_folder, text_file, tmp_path / "two")
    position = line.index("--learning-rate")
    del line[position : position + 2]
    done = start(*line)
    assert done.returncode == 0, done.stderr
    heal(student, str(dense_folder), tmp_path / "one", text=str(text_file), settings=FOUND)
    one, two = (told(tmp_path / name) for name in ("one", "two"))
    assert two["learning_rate"]["value"] == one["learning_rate"]["value"]
    assert two["best_step"] == one["best_step"]
    tried = [torch.tensor(each["learning_rate"]["tried"]) for each in (one, two)]
    assert relative_error(*tried) < 1e-3


@pytest.mark.parametrize("given", [None, 0.2], ids=["found", "far too high"])
def test_a_run_that_was_broken_off_decides_the_same(given, cheap, student, dense_folder, text_file, tmp_path):
    settings = SAME.model_copy(update={"tokens": 1024, "learning_rate": given, "evaluations": 8})

    def healed(name: str) -> None:
        heal(student, str(dense_folder), tmp_path / name, text=str(text_file), settings=settings)

    def break_off(*_, **__):
        raise InterruptedError

    def at_third(callback, arguments, state, control, **more):
        return break_off() if state.global_step >= 3 else evaluated(callback, arguments, state, control, **more)

    healed("whole")
    assert (told(tmp_path / "whole")["best_step"] == 0) == (given is not None)
    evaluated = BestCallback.on_evaluate
    broken = {"an evaluation": (BestCallback, "on_evaluate", at_third), "the end": (run, "read_outcome", break_off)}
    for name, where in broken.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*where)
            with pytest.raises(InterruptedError):
                healed(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rate, "_sweep", break_off)  # the rate is not found again
            healed(name)
        assert told(tmp_path / name) == told(tmp_path / "whole")
        assert not changed(tmp_path / name, tmp_path / "whole")


def test_a_killed_run_resumes_to_the_same_losses(student, dense_folder, text_file, tmp_path):
    process = forked.command(*command(student, dense_folder, text_file, tmp_path / "killed"))
    trainer = tmp_path / "killed.partial" / "trainer"
    while not list(trainer.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    checkpoint = min(trainer.glob("checkpoint-*"))
    shutil.copytree(checkpoint, trainer / "checkpoint-9999")  # as if killed while it wrote the next one
    (trainer / "checkpoint-9999" / "trainer_state.json").write_text('{"epo')

    for name in ("killed", "whole"):
        heal(student, str(dense_folder), tmp_path / name, text=str(text_file), settings=SAME)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert not changed(tmp_path / "killed", tmp_path / "whole")


def test_every_epoch_counts(student, dense_folder, text_file, tmp_path):
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=SAME)
    assert curve(tmp_path / "out")[-1]["step"] == 2 * (2048 // MADE_WITH.length // 4)


def test_checkpoints_draw_no_bars_across_the_progress(student, dense_folder, text_file, tmp_path, capfd):
    settings = SAME.model_copy(update={"tokens": 1024, "epochs": 1})
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    assert not re.search("Writing model shards|Loading weights", "".join(capfd.readouterr()))


def test_what_was_healed_before_is_told_where_it_gained(healed, dense_folder, text_file, tmp_path):
    first = {"tokens": 4096, "text": "words.txt"}
    settings = QUICK.model_copy(update={"tokens": 512, "evaluations": 1})
    heal(healed, str(dense_folder), tmp_path / "again", text=str(text_file), settings=settings)
    assert told(healed)["before"] == []
    assert told(tmp_path / "again")["before"] == [first]
    assert (
        "on 512 tokens of words.txt, after the same on 4,096 tokens of words.txt.\n"
        in (tmp_path / "again" / "README.md").read_text()
    )
    second = {"tokens": 512, "text": "other.txt", "before": [first]}
    assert run._healed_before({"healing": second | {"best_step": 3}}) == [first, {"tokens": 512, "text": "other.txt"}]
    assert run._healed_before({"healing": second | {"best_step": 0}}) == [first]
    assert run._healed_before({}) == []


@pytest.mark.engine
def test_llama_cpp_agrees_on_what_was_healed(text_file, tmp_path):
    save_model(CONFIGS["gqa-tied"], tmp_path / "dense")
    factorize(str(tmp_path / "dense"), tmp_path / "student", "S2A2E8", text=str(text_file), settings=MADE_WITH)
    heal(tmp_path / "student", str(tmp_path / "dense"), tmp_path / "healed", text=str(text_file), settings=QUICK)
    check_no_worse(tmp_path, {"healed": 1.5})


def test_refusals(student, dense_folder, text_file, tmp_path):
    def refused(match: str, **changes):
        arguments = {"student": student, "teacher": str(dense_folder), "out": tmp_path / "out", "text": str(text_file)}
        with pytest.raises(FactorLLMError, match=match):
            heal(**arguments | {"settings": QUICK} | changes)
        assert not (tmp_path / "out").exists()

    save_dense(CONFIGS["gqa-tied"], tmp_path / "other", seed=1)
    refused("is not the dense model", teacher=str(tmp_path / "other"))
    refused("no checkpoint made by factorllm", student=tmp_path / "other")
    refused("cannot be shared", settings=QUICK.model_copy(update={"batch": 3}))
    refused("too short", settings=QUICK.model_copy(update={"tokens": 10_000_000}))
    older = tmp_path / "older"
    shutil.copytree(student, older)
    (older / "factorllm.partition.json").write_text("[[1, 1]]")
    refused("is damaged", student=older)
    for some in (json.loads((student / "factorllm.partition.json").read_text())[1:], []):
        (older / "factorllm.partition.json").write_text(json.dumps(some))
        refused(f"it is of {len(some)} FFNs, not of 3", student=older)
    (older / "factorllm.partition.json").unlink()
    refused("has no factorllm.partition.json", student=older)
    for name, value in {"label_weight": math.inf, "learning_rate": math.nan, "rate": 1e-4}.items():
        with pytest.raises(ValidationError, match=name):
            HealSettings(**{name: value})


@pytest.mark.parametrize(
    ("recipe", "rate"), [("S3A3E8", 3e-5), ("S15A0E16", 3e-5), ("S6A0E8", 1e-4), ("S2A2E8", 1e-4), ("S1A1E8", 1e-4)]
)
def test_the_usual_learning_rate_suits_the_student(recipe, rate):
    assert usual_rate(parse_recipe(recipe).shape(64), 0.2) == pytest.approx(rate)
    assert usual_rate(parse_recipe(recipe).shape(64), 0.02) == pytest.approx(rate / 10)


def test_the_size_of_the_weights_is_that_of_the_median_matrix(tmp_path):
    matrices = {
        f"model.layers.{layer}.{name}.weight": torch.full((4, 4), value)
        for layer in (0, 1)
        for name, value in (("a", -0.1), ("b", 0.2), ("c", 9.0))
    }
    others = {"model.layers.0.norm.weight": torch.full((4,), 7.0), "lm_head.weight": torch.full((4, 4), 8.0)}
    save_file(matrices | others, tmp_path / "model.safetensors")
    assert typical_weight(TensorFolder(tmp_path, "student")) == pytest.approx(0.2)


def test_the_rate_is_a_safe_part_of_the_one_that_brought_the_divergence_down_most():
    tried = [(1e-5, 0.49), (2e-5, 0.45), (4e-5, 0.40), (8e-5, 0.44), (16e-5, 0.9)]
    assert choose(0.5, tried) == pytest.approx(4e-5 * FRACTION)
    assert choose(0.3, tried) == 1e-5


def test_a_rate_far_too_high_leaves_the_input_as_it_was_and_says_so(student, dense_folder, text_file, tmp_path):
    console = Console(record=True, width=400, file=io.StringIO())
    settings = QUICK.model_copy(update={"learning_rate": 100 * QUICK.learning_rate})
    found = heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    for path in student.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert found.results["healed"]["perplexity"] == found.results["student"]["perplexity"]
    healing = told(tmp_path / "out")
    assert healing["best_step"] == 0
    assert healing["outcome"] == found.outcome
    assert "nothing was gained" in found.outcome
    assert "0.05, which was given" in found.outcome
    assert "Nothing was gained" in (tmp_path / "out" / "README.md").read_text()
    validation = losses(tmp_path / "out", "eval_loss")
    assert min(validation) == validation[0]
    assert len(validation) == 1 + QUICK.patience
    show_healed(console, found)
    assert found.outcome in console.export_text().splitlines()
    again = heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    assert again == replace(found, seconds=None)


def test_the_loss_of_the_start_is_measured_before_the_first_step(student, healed, dense_folder, text_file, tmp_path):
    validation = opened(student, dense_folder, text_file, tmp_path / "out")["validation"]
    dense, sparse = (
        torch.cat([load_student(folder)(rows).logits.detach() for rows in validation.split(2)])
        for folder in (dense_folder, student)
    )
    start = kd_loss(sparse, *top_log_probs(dense, QUICK.vocabulary, 1.0)).item()
    first = next(entry for entry in curve(healed) if "eval_loss" in entry)
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(start, rel=1e-3)
    assert told(healed)["best_step"] > 0
    assert f"{first['eval_loss']:.4f} before" in told(healed)["outcome"]


def test_what_is_told_at_a_temperature_is_the_divergence_there(student, dense_folder, text_file, tmp_path):
    """Not times T^2, as the loss has it; and T is said."""
    validation = opened(student, dense_folder, text_file, tmp_path / "opened")["validation"]
    dense, sparse = (
        torch.cat([load_student(folder)(rows).logits.detach() for rows in validation.split(2)]) / 2
        for folder in (dense_folder, student)
    )
    start = kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    settings = QUICK.model_copy(update={"temperature": 2.0, "vocabulary": 257, "tokens": 1024, "evaluations": 1})
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    healed = heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings, console=console)
    measured = "KL at temperature 2 to the teacher on validation text"
    first = losses(tmp_path / "out", "eval_loss")[0]
    assert first == pytest.approx(start.item(), rel=2e-3)
    assert f"step 0: {measured} {first:.4f}" in shown.getvalue()
    assert measured in healed.outcome


@pytest.mark.parametrize("recipe", ["S2A2E8", "S4A0E8"])
def test_the_found_rate_heals_as_the_same_rate_given(recipe, cheap, dense_folder, text_file, tmp_path):
    factorize(str(dense_folder), tmp_path / "student", recipe, text=str(text_file), settings=MADE_WITH)
    wanted = QUICK.model_copy(update={"learning_rate": None})
    heal(tmp_path / "student", str(dense_folder), tmp_path / "found", text=str(text_file), settings=wanted)
    found = told(tmp_path / "found")["learning_rate"]
    assert found["origin"] == "found"
    assert 2 < len(found["tried"]) <= STEPS
    same = QUICK.model_copy(update={"learning_rate": found["value"]})
    heal(tmp_path / "student", str(dense_folder), tmp_path / "given", text=str(text_file), settings=same)
    assert told(tmp_path / "given")["learning_rate"] == {"value": found["value"], "origin": "given"}
    assert not changed(tmp_path / "found", tmp_path / "given")
    assert curve(tmp_path / "found") == curve(tmp_path / "given")


@pytest.mark.parametrize(
    "changes",
    [{"train": "router", "pa_weight": 1.0}, {"train": "lora"}, {"hidden_weight": 1.0}, {"gates": "soft"}],
    ids=str,
)
def test_a_rate_is_found_whatever_learns(changes, cheap, student, dense_folder, text_file, tmp_path):
    settings = QUICK.model_copy(update={"learning_rate": None, "tokens": 1024, "evaluations": 1, **changes})
    found = heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    assert told(tmp_path / "out")["learning_rate"]["origin"] == "found"
    validation = losses(tmp_path / "out", "eval_loss")
    assert ("nothing was gained" in found.outcome) == (min(validation) == validation[0])


@pytest.mark.parametrize(("train", "times"), [("all", 1), ("lora", 30), ("mor1e", 30)])
def test_a_search_that_would_cost_too_much_is_left_out_and_that_is_said(
    train, times, student, dense_folder, text_file, tmp_path
):
    """Adapters take a larger rate than the matrices that they are of."""
    console = Console(record=True, width=200, file=io.StringIO())
    settings = QUICK.model_copy(update={"learning_rate": None, "tokens": 1024, "train": train, "kinds": 2})
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings, console=console)
    usual = usual_rate(parse_recipe("S2A2E8").shape(64), times * typical_weight(TensorFolder(student)))
    assert told(tmp_path / "out")["learning_rate"] == {"value": usual, "origin": "usual"}
    assert re.search(r"learning rate [0-9.e-]+, as usual: to find one would be [0-9]{3}% of", console.export_text())


class Poisoned(FactorTrainer):
    """One batch in which the loss is `factor` times its own."""

    at, factor = 4, 1e6

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.batches = getattr(self, "batches", 0) + 1
        return loss * (self.factor if self.batches == self.at else 1.0)

    def _clip_grad_norm(self, model):
        before = super()._clip_grad_norm(model)
        after = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        self.norms = [*getattr(self, "norms", []), (float(before), float(torch.stack(after).norm()) if after else None)]
        return before


def poisoned(kind, precision, student, dense_folder, text_file, out) -> FactorTrainer:
    """Two steps of two parts each, of which the fourth part is poisoned."""
    settings = QUICK.model_copy(update={"precision": precision, "tokens": 1024})
    with open_heal_job(student, str(dense_folder), out, str(text_file), settings, False, None) as job:
        targets = _ask_teacher(job)
        arguments = common_arguments(job, 1e-3, 2, "probe", save_strategy="no", logging_steps=1, report_to=[])
        trainer = new_trainer(job, arguments, targets["train"], targets["validation"], kind)
        trainer.train()
    return trainer


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_large_gradient_is_clipped_to_norm_one_over_the_whole_step(
    precision, student, dense_folder, text_file, tmp_path
):
    trainer = poisoned(Poisoned, precision, student, dense_folder, text_file, tmp_path / "out")
    (_, usual), (before, after) = trainer.norms
    assert before > 1000
    assert after == pytest.approx(1.0, rel=1e-2)
    assert usual <= 1.01


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out(factor, student, dense_folder, text_file, tmp_path):
    kind = type("NotFinite", (Poisoned,), {"factor": factor})
    one = type("OneStep", (Poisoned,), {"at": 0})
    left_out, plain = (
        poisoned(each, "float32", student, dense_folder, text_file, tmp_path / each.__name__) for each in (kind, one)
    )
    assert [entry["step"] for entry in left_out.state.log_history if SKIPPED in entry] == [1]
    assert not [entry for entry in plain.state.log_history if SKIPPED in entry]
    # The second step was left out: one step on each parameter, and moments of finite numbers.
    state = left_out.optimizer.state_dict()["state"].values()
    assert {int(each["step"]) for each in state} == {1}
    assert all(each[name].isfinite().all() for each in state for name in ("exp_avg", "exp_avg_sq"))
    assert {int(each["step"]) for each in plain.optimizer.state_dict()["state"].values()} == {2}


def test_kd_loss_is_the_kl_divergence_when_nothing_is_left_out():
    teacher, student = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    ids, log_probs = top_log_probs(teacher, 31, 2.0)
    full = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    assert kd_loss(student, ids, log_probs, 2.0).item() == pytest.approx(4 * full.sum(-1).mean().item(), rel=1e-4)
    few, few_probs = top_log_probs(teacher, 4, 2.0)
    assert 0 < kd_loss(student, few, few_probs, 2.0) < kd_loss(student, ids, log_probs, 2.0)
    assert relative_error(kd_loss(teacher, few, few_probs, 2.0) + 1, torch.tensor(1.0)) < 1e-5


def test_label_loss_is_what_transformers_computes():
    logits, tokens = torch.randn(2, 7, 32), torch.randint(32, (2, 7))
    expected = ForCausalLMLoss(logits, tokens, vocab_size=32)
    assert label_loss(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_matched_streams_are_evenly_spaced_and_end_at_the_last():
    streams = tuple(torch.full((1, 2, 4), float(depth)) for depth in range(7))
    assert matched_streams(streams, 3)[0, 0, :, 0].tolist() == [2, 4, 6]
    assert matched_streams(streams, 1)[0, 0, :, 0].tolist() == [6]


def test_hidden_loss_is_relative_to_the_length_of_each_stream():
    teacher = torch.randn(2, 5, 3, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    assert hidden_loss(teacher, teacher).item() == 0
    assert hidden_loss(1.5 * teacher, teacher).item() == pytest.approx(0.25)


def test_balance_loss_is_one_for_an_even_load_and_n_over_k_for_the_worst():
    even = torch.eye(4).repeat(2, 1)[None] * 20
    assert balance_loss(even, 1).item() == pytest.approx(1.0, abs=1e-3)
    worst = torch.tensor([20.0, 0, 0, 0]).expand(1, 8, 4)
    assert balance_loss(worst, 1).item() == pytest.approx(4.0, abs=1e-3)
