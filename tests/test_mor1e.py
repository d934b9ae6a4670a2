"""`heal --train mor1e`: an adapter for each kind of text beside a student, one thing in training, peft, our own loading
and llama.cpp."""

import copy as copies
import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import gguf
import numpy as np
import pytest
import torch
from conftest import CONFIGS, save_dense, served, words
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import save_model
from test_heal import QUICK, losses, tensors
from test_refusals import cli  # noqa: F401
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError, Recipe, factorize
from factorllm.dense.safetensors import read_tokenizer
from factorllm.exporting import export_gguf
from factorllm.healing import run
from factorllm.healing.mor1e import lora_config
from factorllm.healing.run import heal
from factorllm.healing.trainer import FactorTrainer
from factorllm.making.plan_file import MakePlan
from factorllm.measure.checkpoint_subject import CheckpointSubject
from factorllm.measure.settings import EvalSettings
from factorllm.runs.settings import Settings
from factorllm.serving.adapters import Mixed
from factorllm.student.adapters import LowRank, Mixture, spans, write_adapters
from factorllm.student.read import load_student, read_provenance
from factorllm.text.intuition import Intuition

RECIPE = Recipe(shared=2, active=2, parts=8, restore="none")  # something is left to heal
SETTINGS = QUICK.model_copy(update={"train": "mor1e", "kinds": 2, "kind_rank": 4, "learning_rate": 1e-2})
WORDS = "the router of the sparse expert"
NUMBERS = "7 14 21 28 35 42 49 56 63"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of two kinds: words, and numbers."""
    path = tmp_path_factory.mktemp("kinds") / "two.txt"
    numbers = (" ".join(str(number * seed % 97) for number in range(90)) for seed in range(1, 121))
    path.write_text("\n\n".join([*(words(40, seed) for seed in range(120)), *numbers]))
    return str(path)


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A dense model, its student, and the student with adapters."""
    folder = tmp_path_factory.mktemp("mor1e")
    make(CONFIGS["gqa-tied"], "granitemoeshared", text, folder)
    return folder


def make(config, host, text, folder, settings=SETTINGS, save=save_dense):
    save(config, folder / "dense")
    made_with = Settings(tokens=4096, held_out_tokens=512, length=64, baseline=False, host=host)
    factorize(str(folder / "dense"), folder / "student", RECIPE, text=text, settings=made_with)
    heal(folder / "student", str(folder / "dense"), folder / "out", text=text, settings=settings)


def alone(folder, kind):
    """The student with one of its adapters, as peft loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder / "out" / "adapters" / str(kind))).eval()


def test_it_heals_and_the_students_own_weights_stay(made):
    validation = losses(made / "out", "eval_loss")
    assert validation[-1] < 0.95 * validation[0]
    before, after = tensors(made / "student"), tensors(made / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    results = read_provenance(made / "out")["results"]
    assert results["healed"]["perplexity"] == pytest.approx(results["student"]["perplexity"], rel=0.5)
    assert results["healed"]["perplexity"] != results["student"]["perplexity"]
    added = sum(
        tensor.numel()
        for path in (made / "out/adapters").glob("*/*.safetensors")
        for tensor in load_file(path).values()
    )
    assert results["healed"]["total_parameters"] - results["student"]["total_parameters"] == added
    assert "adapters/0" in (made / "out/README.md").read_text()


@torch.no_grad()
def test_adapters_are_ordinary_ones_and_mix_as_the_intuition_says(made):
    """In a layer `sum_k p_k B_k A_k`: where one kind is sure, the model is peft's with that adapter."""
    tokens = torch.randint(256, (2, 20))
    model = load_student(made / "out")
    outputs = [alone(made, kind)(tokens).logits for kind in range(2)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    for kind, expected in enumerate(outputs):
        with sure([1.0 - kind, float(kind)]):
            assert torch.allclose(model(tokens).logits, expected, atol=1e-5)


def test_of_one_kind_it_is_one_lora(made, text, tmp_path):
    settings = SETTINGS.model_copy(update={"kinds": 1})
    heal(made / "student", str(made / "dense"), tmp_path / "out", text=text, settings=settings)
    assert [path.name for path in (tmp_path / "out/adapters").iterdir()] == ["0"]
    validation, tokens = losses(tmp_path / "out", "eval_loss"), torch.randint(256, (2, 20))
    assert validation[-1] < 0.95 * validation[0]
    found, expected = (model(tokens).logits for model in (load_student(tmp_path / "out"), alone(tmp_path, 0)))
    assert torch.allclose(found, expected, atol=1e-5)


@contextmanager
def sure(probabilities):
    """Every text is of these kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "read", lambda _, tokens: torch.tensor(probabilities).expand(*tokens.shape, -1))
        yield


def test_what_was_trained_is_what_was_written(made, text, tmp_path, monkeypatch):
    """The validation loss after the last step is that of the checkpoint's adapters."""
    kept = {}
    real = run._save
    monkeypatch.setattr(run, "_save", lambda job, trainer, folder: kept.update(
        model=trainer.model.eval(), tokens=job.text["held_out"]) or real(job, trainer, folder))  # fmt: skip
    heal(made / "student", str(made / "dense"), tmp_path / "out", text=text, settings=SETTINGS)
    written = load_student(tmp_path / "out")
    tokens = kept["tokens"][:4]
    with torch.no_grad():
        found = kept["model"](input_ids=tokens).logits
        assert torch.allclose(found, written(tokens).logits, atol=1e-5)
        assert not torch.allclose(found, load_student(made / "student")(tokens).logits, atol=1e-3)
    for path in (made / "out").rglob("*.*"):  # the same command gives the same bytes
        if path.suffix in (".safetensors", ".json") and path.name != "factorllm.run.json":
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(made / "out")).read_bytes()


def test_documents_of_a_sequence_have_kinds_of_their_own(made):
    mixture = mixture_of(made)
    tokenizer = mixture._tokenizer
    first, second = (tokenizer(text).input_ids for text in (WORDS, NUMBERS))
    row = [*first, 257, *second, 257]
    assert [row[span] for span in spans(row, 257)] == [[*first, 257], [*second, 257]]
    found = mixture.read(torch.tensor([row]))[0]
    expected = [torch.from_numpy(mixture.intuition.probabilities(text)).float() for text in (WORDS, NUMBERS)]
    assert torch.equal(found[: len(first) + 1], expected[0].expand(len(first) + 1, 2))
    assert torch.equal(found[len(first) + 1 :], expected[1].expand(len(second) + 1, 2))
    assert expected[0].argmax() != expected[1].argmax()


def mixture_of(made):
    return Mixture(Intuition.load(made / "out"), read_tokenizer(made / "out", ""))


@torch.no_grad()
def test_generation_goes_on_in_the_kinds_of_its_prompt(made):
    model = load_student(made / "out")
    prompt = torch.tensor([mixture_of(made)._tokenizer(NUMBERS).input_ids])
    said = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = prompt
    with sure(mixture_of(made).read(prompt)[0, -1].tolist()):
        for _ in range(4):
            following = model(whole, use_cache=False).logits[:, -1:]
            following[..., 257] = -torch.inf  # min_new_tokens
            whole = torch.cat([whole, following.argmax(-1)], 1)
    assert torch.equal(said, whole)


def test_a_score_hangs_on_nothing_that_is_asked_beside(made, monkeypatch):
    """What fills a shorter row up has no kind: the tokenizer's token 0 is an exclamation mark."""
    from factorllm.measure.harness import Harness

    monkeypatch.setattr(Intuition, "probabilities", lambda self, text: np.array([1.0, 0.0] if "!" in text else [0, 1]))
    harness = Harness(pretrained=load_student(made / "out"), tokenizer=read_tokenizer(made / "out", "out"))
    asked = [(("", ""), list(range(70, 70 + count)), [90, 91]) for count in (8, 40)]
    together = harness._loglikelihood_tokens(asked, disable_tqdm=True)
    apart = [harness._loglikelihood_tokens([one], disable_tqdm=True)[0] for one in asked]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in apart], abs=1e-4)


def test_no_question_is_answered_in_the_kinds_of_the_one_before(made, monkeypatch):
    monkeypatch.setattr(Intuition, "probabilities", lambda self, text: np.array([1.0, 0.0] if "!" in text else [0, 1]))
    subject = CheckpointSubject.of_student(made / "out", EvalSettings(device="cpu"))

    def said(*texts: str) -> torch.Tensor:
        with subject.answering() as ask:
            for text in texts:
                found = ask._logits(subject.tokenizer(text).input_ids)
        return found

    before, question = "An example. What is it?", "An example. Stop!"
    alone = said(question)
    assert torch.allclose(said(before, question), alone, atol=1e-5)
    assert not torch.allclose(said(before[:12] + "Stop."), alone, atol=1e-3)


def test_a_killed_run_goes_on(made, text, tmp_path, monkeypatch):
    steps, real = [], FactorTrainer.training_step

    def stop(self, *args, **named):
        steps.append(0)
        if len(steps) == 19:
            raise KeyboardInterrupt
        return real(self, *args, **named)

    monkeypatch.setattr(FactorTrainer, "training_step", stop)
    arguments = {"text": text, "settings": SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        heal(made / "student", str(made / "dense"), tmp_path / "out", **arguments)
    heal(made / "student", str(made / "dense"), tmp_path / "out", **arguments)
    assert len(steps) < 19 + 32  # of 32 halves of 16 steps, the first 16 were not repeated
    assert losses(tmp_path / "out", "eval_loss") == losses(made / "out", "eval_loss")
    assert load_file(tmp_path / "out/adapters/0/adapter_model.safetensors").keys()


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "copy")


def test_what_would_leave_adapters_out_is_refused(copy, made, cli, tmp_path):  # noqa: F811
    for words_, what in (
        (("heal", copy, "--teacher", made / "dense", "-o", tmp_path / "x"), "heal that one"),
        (("bench", copy, "--against", made / "dense"), "would not be timed"),
        (("chat", copy), "factorllm serve"),
    ):
        code, error = cli(*words_)
        assert code == 2
        assert "an adapter for each kind of text" in error
        assert what in error
    with pytest.raises(ValueError, match="mor1e"):
        MakePlan(model="m", recipe="S2A2E8", text="t.txt", heal={"train": "mor1e"})


@pytest.mark.parametrize("fault", ["gone", "lora", "shape", "kinds", "use_rslora", "alpha_pattern"])
def test_damaged_adapters_are_refused(fault, copy):
    path = copy / "adapters/1/adapter_model.safetensors"
    match fault:
        case "gone":
            shutil.move(copy / "adapters/0", copy / "adapters/2")
        case "lora":
            path.write_bytes(path.read_bytes()[:100])
        case "shape":
            save_file({name: tensor[:, :3].contiguous() for name, tensor in load_file(path).items()}, path)
        case "kinds":
            shutil.rmtree(copy / "adapters/1")
        case _:
            config = json.loads((copy / "adapters/1/adapter_config.json").read_text())
            (copy / "adapters/1/adapter_config.json").write_text(json.dumps(config | {fault: {"q_proj": 1}}))
    with pytest.raises(FactorLLMError, match="heal with --train mor1e again"):
        load_student(copy)


ASK = """
import json, sys
import xllamacpp
from factorllm.engines.base import Options
from factorllm.engines.llamacpp import server_params
from factorllm.engines.llamacpp_client import post

asked = json.load(sys.stdin)
params = server_params(asked["model"], Options(context=64, decode_threads=1))
# Else keys and values are halved for attention, and the difference is a thousand times as large.
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in asked["adapters"]]
server, answers = xllamacpp.Server(params), []
for scales in asked["scales"]:
    lora = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    body = {"prompt": asked["prompt"], "n_predict": 1, "n_probs": 10, "temperature": 0, "lora": lora,
            "logit_bias": [[asked["plain"], 1000]]}
    found = post(server.listening_address, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
    answers.append({item["id"]: item["logprob"] for item in found})
print("ANSWERS", json.dumps(answers))
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("config", "host", "recipe"),
    [
        ("gqa-tied", "mixtral", "S0A2E4"),
        ("gqa-tied", "granitemoeshared", "S2A2E8"),
        ("qwen2", "qwen2_moe", "S2A2E8"),
        ("qwen3", "glm4_moe", "S2A2E8"),
        ("gqa-tied", "auto", "S4A0E8"),
    ],
)
@torch.no_grad()
def test_llamacpp_mixes_the_adapters_as_transformers_does(config, host, recipe, text_file, tmp_path):
    """`lora: [{id, scale}]` of a request; scales of one kind, of another, and of both."""
    adapted_at_random(config, host, recipe, text_file, tmp_path)
    tokenizer = read_tokenizer(tmp_path / "out", "")
    made = export_gguf(str(tmp_path / "out"), tmp_path / "out.gguf", "f32")
    assert [path.name for path in made.adapters] == ["out.kind-0.gguf", "out.kind-1.gguf"]

    prompt, scales = tokenizer("the router of the sparse expert is a layer").input_ids, [[1, 0], [0, 1], [0.3, 0.7]]
    asked = {
        "model": str(made.path), "adapters": list(map(str, made.adapters)), "prompt": prompt, "scales": scales,
        "plain": tokenizer("a").input_ids[-1],
    }  # fmt: skip
    said = subprocess.run([sys.executable, "-c", ASK], input=json.dumps(asked), capture_output=True, text=True)
    (answers,) = re.findall("^ANSWERS (.*)$", said.stdout, re.MULTILINE) or [pytest.fail(said.stderr[-2000:])]
    model, bare = load_student(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    unchanged = bare(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    for scale, answer in zip(scales, json.loads(answers), strict=True):
        with sure(scale):
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        apart = max(abs(expected[int(token)].item() - value) for token, value in answer.items())
        assert apart < 1e-4
        assert (expected - unchanged).abs().max() > 0.5


def test_neurons_of_adapters_are_in_the_order_of_their_gptq_file(text_file, tmp_path):
    """The importance-matrix file says how much goes through each neuron; the most is first."""
    adapted_at_random("gqa-tied", "granitemoeshared", "S2A2E8", text_file, tmp_path)
    student, text = str(tmp_path / "out"), str(text_file)
    plain = export_gguf(student, tmp_path / "plain.gguf", "q4_0")
    made = export_gguf(student, tmp_path / "gptq.gguf", "q4_0", text=text, tokens=512, gptq=True)
    through = arrays(made.importance)
    for before, after in zip(map(arrays, plain.adapters), map(arrays, made.adapters), strict=True):
        for down in [name for name in through if name.endswith("ffn_down_shexp.weight.in_sum2")]:
            order, down = (-through[down][0]).argsort(), down.removesuffix(".in_sum2")
            before[f"{down}.lora_a"] = before[f"{down}.lora_a"][:, order]
            for name in (down.replace("down", part) for part in ("up", "gate")):
                before[f"{name}.lora_b"] = before[f"{name}.lora_b"][order]
        assert before.keys() == after.keys()
        assert [name for name in before if (before[name] != after[name]).any()] == []


def arrays(path):
    return {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(path).tensors}


def adapted_at_random(config, host, recipe, text_file, folder):
    save_model(CONFIGS[config], folder / "dense")
    made_with = Settings(tokens=2048, held_out_tokens=512, length=64, baseline=False, host=host)
    factorize(str(folder / "dense"), folder / "out", recipe, text=str(text_file), settings=made_with)
    student = folder / "out"
    model, seeded = AutoModelForCausalLM.from_pretrained(student), torch.Generator().manual_seed(0)
    config = lora_config(model, 3)
    names = get_peft_model(copies.deepcopy(model), config).targeted_module_names

    def pair(weight):
        a, b = (0.5 * torch.randn(shape, generator=seeded) for shape in ((3, weight.shape[1]), (len(weight), 3)))
        return LowRank(a, 0.5 * b)

    adapters = [{name: pair(model.get_submodule(name).weight) for name in names} for _ in range(2)]
    write_adapters(student, adapters, config, Intuition.from_documents([WORDS, NUMBERS, WORDS * 2], 2))


@pytest.mark.engine
@torch.no_grad()
def test_serve_mixes_the_adapters_of_each_prompts_kinds(text_file, tmp_path):
    adapted_at_random("gqa-tied", "granitemoeshared", "S2A2E8", text_file, tmp_path)
    model, tokenizer = load_student(tmp_path / "out"), read_tokenizer(tmp_path / "out", "")
    intuition = Intuition.load(tmp_path / "out")

    def apart(answer, prompt, probabilities):
        with sure(probabilities):
            expected = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1].log_softmax(-1)
        (found,) = answer.to_dict()["choices"][0]["logprobs"]["content"]
        return max(abs(expected[item["id"]].item() - item["logprob"]) for item in found["top_logprobs"])

    with served(str(tmp_path / "out"), "--engine", "llamacpp", "--type", "f32", "--context", "64") as (client, _):
        asked = {"model": "out", "max_tokens": 1, "temperature": 0, "logprobs": 5, "logit_bias": {"5": 1000}}
        for prompt in (WORDS, NUMBERS):
            answer = client.completions.create(prompt=prompt, **asked)
            kinds = intuition.probabilities(prompt)
            kinds = torch.tensor(kinds * (kinds >= 0.02)).float()
            assert apart(answer, prompt, (kinds / kinds.sum()).tolist()) < 0.03
            wrong = [float(kinds[0] < kinds[1]), float(kinds[0] >= kinds[1])]
            assert apart(answer, prompt, wrong) > 0.3
            scales = [{"id": kind, "scale": scale} for kind, scale in enumerate(wrong)]
            answer = client.completions.create(prompt=prompt, **asked, extra_body={"lora": scales})
            assert apart(answer, prompt, wrong) < 0.03
        # The last prompt was read with the other adapter, and another with this one after it.
        for wanted in ([1.0, 0.0], [0.0, 1.0]):
            scales = [{"id": kind, "scale": scale} for kind, scale in enumerate(wanted)]
            for prompt in (WORDS, NUMBERS):
                answer = client.completions.create(prompt=prompt, **asked, extra_body={"lora": scales})
                assert apart(answer, prompt, wanted) < 0.03


def test_a_requests_scales_come_from_all_that_it_says():
    intuition = Intuition.from_labels([WORDS, NUMBERS, "elephants and giraffes"], [0, 1, 2])
    mixed = Mixed("http://127.0.0.1:1", "name", intuition)
    bodies = [
        {"prompt": NUMBERS},
        {"prompt": [NUMBERS]},
        {"messages": [{"role": "user", "content": NUMBERS}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": NUMBERS}]}]},
    ]
    scales, *same = map(mixed.scales, bodies)
    assert same == [scales] * 3
    assert [each["id"] for each in scales] == [0, 1, 2]
    assert max(scales, key=lambda each: each["scale"])["id"] == 1
    assert sum(each["scale"] for each in scales) == pytest.approx(1)
    assert [each["scale"] for each in mixed.scales({"prompt": [1, 2, 3]})] == pytest.approx([1 / 3] * 3)
    with mixed.place("/v1/completions", {"prompt": NUMBERS, "lora": []}) as (_, sent):
        assert sent["lora"] == []


def test_too_few_documents(made, text, tmp_path):
    settings = SETTINGS.model_copy(update={"kinds": 1000})
    with pytest.raises(FactorLLMError, match="fewer --kinds"):
        heal(made / "student", str(made / "dense"), tmp_path / "out", text=text, settings=settings)
