"""A student that drafts for its dense model: the same text, and only where it pays."""

import random
import types
from dataclasses import replace

import openai
import pytest
import torch
from conftest import BASE, save_dense
from forked import free_port
from gguf_parts import put_together, taken_apart
from test_export import byte_level_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from factorllm import FactorLLMError, serve
from factorllm.engines.base import Options
from factorllm.engines.llamacpp import open_server
from factorllm.engines.llamacpp_client import post
from factorllm.exporting import export_gguf
from factorllm.serving.lossless import SAMPLE, Costs, Drafting, decide, lossless_params, try_out
from factorllm.serving.serve import llamacpp_command
from factorllm.serving.settings import ServeSettings

TOKENIZER = byte_level_tokenizer()
DEEP = LlamaConfig(
    **BASE
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "max_position_embeddings": 512}
    | {"vocab_size": len(TOKENIZER)}
)
SHALLOW = 2  # layers of the deep model that do something


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A deep model, a shallow one that is the same function, and one that is nearly the same, as GGUF files."""
    folder = tmp_path_factory.mktemp("pair")
    deep = save_dense(DEEP, folder / "deep")
    with torch.no_grad():
        for layer in deep.model.layers[SHALLOW:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save(deep, folder / "deep")
    config = LlamaConfig(**DEEP.to_dict() | {"num_hidden_layers": SHALLOW})
    shallow = AutoModelForCausalLM.from_config(config)
    shallow.load_state_dict(deep.state_dict(), strict=False)
    save(shallow, folder / "shallow")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    save(shallow, folder / "near")
    for name in ("deep", "shallow", "near"):
        export_gguf(str(folder / name), folder / f"{name}.gguf", "q8_0")
    return folder


def save(model, folder):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


@pytest.mark.parametrize(("acceptance", "token", "wanted"), [(0.9, 0.4, 1.58), (0.8, 0.65, 1.09), (0.7, 0.9, 0.89)])
def test_the_forecast_is_the_formula(acceptance, token, wanted):
    longest, forecast = Costs(acceptance, 1.0, token).best()
    assert forecast == pytest.approx(wanted, abs=0.01)
    assert longest == 1 or forecast > Costs(acceptance, 1.0, token).speed_up(longest - 1)


def test_the_forecast_is_what_a_loop_would_measure():
    costs, longest, chooser = Costs(0.8, 1.2, 0.1), 5, random.Random(0)
    tokens = steps = 0.0
    for _ in range(20_000):
        taken = next((i for i in range(longest) if chooser.random() >= costs.acceptance), longest)
        tokens, steps = tokens + taken + 1, steps + costs.round + longest * costs.token
    assert costs.speed_up(longest) == pytest.approx(tokens / steps, rel=0.01)


def test_how_sure_the_student_must_be():
    """A draft that is taken with that probability brings as much as its cost would elsewhere."""
    costs = Costs(0.9, 1.0, 0.2)
    longest, forecast = costs.best()
    assert costs.sure(longest) / costs.token == pytest.approx(forecast)


def timed_as(costs, monkeypatch):
    """Servers draft as they do, and take the time that these costs say."""

    def timed(*addresses):
        trial = try_out(*addresses)
        rounds = trial.tokens - trial.accepted
        return replace(trial, alone=trial.tokens, drafted=rounds * costs.round + trial.drafts * costs.token)

    monkeypatch.setattr("factorllm.serving.lossless.try_out", timed)


@pytest.mark.engine
def test_a_cheap_draft_is_on_and_the_text_is_the_dense_models(pair, monkeypatch):
    timed_as(Costs(1.0, 1.1, 0.2), monkeypatch)
    drafting = decide(pair / "deep.gguf", pair / "shallow.gguf", 1, lambda _: None)
    assert drafting == Drafting(pair / "shallow.gguf", 16, 0.0)  # random weights are sure of nothing
    assert texts(pair, drafting) == texts(pair, None)
    assert "--spec-draft-n-max 16" in llamacpp_command(pair / "deep.gguf", ServeSettings(), drafting)


@pytest.mark.engine
@pytest.mark.parametrize("token", [0.2, 0.9])
def test_what_does_not_pay_is_off(token, pair, monkeypatch):
    """By the forecast where a draft is dear, and by the trial where the forecast is too good."""
    timed_as(Costs(1.0, 1.0, 0.9), monkeypatch)
    if token < 0.9:
        monkeypatch.setattr("factorllm.serving.lossless.costs_of", lambda *_: Costs(1.0, 1.0, token))
    said = []
    assert decide(pair / "deep.gguf", pair / "near.gguf", 1, said.append) is None
    assert said[-1].startswith("drafting is off")
    assert any(line.startswith("on the sample") for line in said) == (token < 0.9)


@pytest.mark.engine
@pytest.mark.parametrize("sure", [0.0, 0.4])
def test_drafts_that_are_wrong_change_nothing(pair, sure):
    found = texts(pair, Drafting(pair / "near.gguf", 4, sure), accepted := [])
    assert found == texts(pair, None)
    taken, drafts = map(sum, zip(*accepted, strict=True))
    assert 0 < taken < drafts


def texts(pair, drafting, accepted=None):
    server = open_server(lossless_params(pair / "deep.gguf", Options(context=256, decode_threads=1), drafting), "load")
    found = []
    for text in SAMPLE:
        body = {"prompt": text, "n_predict": 64, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        answer = post(server.listening_address, "/completion", body)
        found.append(answer["tokens"])
        if accepted is not None:
            accepted.append((answer["timings"]["draft_n_accepted"], answer["timings"]["draft_n"]))
    return found


@pytest.mark.engine
def test_another_vocabulary_is_refused(pair, tmp_path):
    parts = taken_apart(pair / "shallow.gguf")
    tokens, *kinds = parts.fields["tokenizer.ggml.tokens"]
    parts.fields["tokenizer.ggml.tokens"] = ([*tokens[:40], tokens[41], tokens[40], *tokens[42:]], *kinds)
    put_together(parts, tmp_path / "other.gguf")
    with pytest.raises(FactorLLMError, match="their vocabularies are not the same"):
        decide(pair / "deep.gguf", tmp_path / "other.gguf", 1, print)


@pytest.mark.engine
def test_serve_answers_as_the_dense_model_and_says_what_it_measured(pair, monkeypatch):
    port, said, answers = free_port(), [], []

    def ask():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(model="any", prompt=SAMPLE[0], max_tokens=32, temperature=0)
        answers.append((answer.model, answer.choices[0].text))

    event = types.SimpleNamespace(wait=ask)
    monkeypatch.setattr("factorllm.serving.serve.threading", types.SimpleNamespace(Event=lambda: event))
    timed_as(Costs(1.0, 1.1, 0.2), monkeypatch)
    settings = ServeSettings(port=port, context=256, threads=1)
    serve(str(pair / "deep.gguf"), "llamacpp", settings=settings, say=said.append)
    lossless = str(pair / "deep.gguf")
    serve(str(pair / "shallow.gguf"), "llamacpp", settings=settings, say=said.append, lossless=lossless)
    assert answers[0] == answers[1]
    assert any(line.startswith("forecast: ") for line in said)
    assert any(line.startswith("measured: ") and "drafts accepted" in line for line in said), said


def test_only_llamacpp_drafts(tmp_path):
    with pytest.raises(FactorLLMError, match="use --engine llamacpp"):
        serve(str(tmp_path), "vllm", lossless="dense")
