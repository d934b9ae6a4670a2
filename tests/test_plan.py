"""What `factorllm plan` foretells: stand-ins are laid out as the real files, and a shape's time is its terms' sum."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from conftest import BASE, CONFIGS
from pydantic import ValidationError
from test_export import save_model
from transformers import LlamaConfig, LlavaConfig

from factorllm import FactorLLMError, Wish, export, factorize
from factorllm.cli import main
from factorllm.dense.headers import read_dense_config
from factorllm.engines import process
from factorllm.measure.cost import dense_shape
from factorllm.planning import forecast as forecasting
from factorllm.planning.outlook import Choice, Outlook, plan
from factorllm.planning.quality import known_quality
from factorllm.planning.stand_in import StandIn, with_layers
from factorllm.recipe import parse_recipe
from factorllm.runs.settings import Settings

FEW = Settings(tokens=512, held_out_tokens=64, length=64, baseline=False)


def layout(path: Path) -> tuple[dict, dict]:
    """The tensors of a GGUF file with shape and type, and its keys but for names and the tokenizer."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (tensor.shape.tolist(), tensor.tensor_type) for tensor in reader.tensors}
    left_out = ("tokenizer.", "general.name", "general.license", "factorllm.", "GGUF.")
    return tensors, {key: field.contents() for key, field in reader.fields.items() if not key.startswith(left_out)}


@pytest.mark.parametrize("name", ["gqa-tied", "gqa-untied", "llama3-rope", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["dense", "S2A2E8", "S4A0E8"])
def test_a_stand_in_is_laid_out_as_the_model_itself(name, recipe, tmp_path, text_file):
    dense = tmp_path / "dense"
    save_model(CONFIGS[name], dense)
    made = dense
    if recipe != "dense":
        cheap = parse_recipe(recipe).model_copy(update={"router": "random", "restore": "none"})
        made = tmp_path / "made"
        factorize(str(dense), made, cheap, text=str(text_file), settings=FEW)
    export(str(made), tmp_path / "real.gguf", "q8_0")
    config = read_dense_config(str(dense))
    shape = dense_shape(config) if recipe == "dense" else parse_recipe(recipe).shape(config.intermediate_size)
    model = StandIn.of(config, shape)
    model.write(tmp_path / "stand-in.gguf", "q8_0")
    real, stand_in = layout(tmp_path / "real.gguf"), layout(tmp_path / "stand-in.gguf")
    assert stand_in == real
    assert model.file_size("q8_0") == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "real.gguf").tensors)


@pytest.mark.parametrize("types", ["q9", "Q8_0", "q8_0,q9", ","])
def test_types_that_there_are_not_are_refused_before_a_model_is_read(types, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["factorllm", "plan", str(tmp_path / "none"), "--types", types])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = "() has no types of files; types: f32," if types == "," else f"no type {types.split(',')[-1]!r}; types: f32,"
    assert capsys.readouterr().err.startswith(f"error: {said}")


def timed_by(law):
    """`measure_speed`, with the seconds of a token that a law says of a stand-in's shape and layers."""

    def measure(subjects, engine, plan, console):
        found = []
        for subject in subjects:
            reader = gguf.GGUFReader(subject.path)
            architecture = reader.fields["general.architecture"].contents()
            said = {key.removeprefix(f"{architecture}."): f.contents() for key, f in reader.fields.items()}
            seconds = law(said)
            found.append(SimpleNamespace(subject=subject, speed=lambda what, s=seconds: 1 / s[what.split()[0]]))
        return found

    return measure


def run_and_timed_by(law):
    """`timed_by`, after the engine has run, so that what it does is tested and how long it took is not."""

    def measure(*asked):
        engine(*asked)
        return timed_by(law)(*asked)

    engine = forecasting.measure_speed
    return measure


def linear(said: dict) -> dict[str, float]:
    """The head of a vocabulary that is no small one 5, and each layer: 2, a hundredth for each neuron that always runs,
    a fiftieth for each routed one, 3 for routing; prefill takes a tenth."""
    routed = said.get("expert_used_count", 0) * said["feed_forward_length"]  # of an expert, in hosts of Llama
    shared = said.get("expert_shared_feed_forward_length", 0) if routed else said["feed_forward_length"]
    head = 5 * (len(said["tokenizer.ggml.tokens"]) > 1024)
    seconds = head + said["block_count"] * (2 + shared / 100 + routed / 50 + 3 * (routed > 0))
    return {"decode": seconds, "prefill": seconds / 10}


def test_a_law_that_is_a_sum_of_terms_is_found_again(monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", timed_by(linear))
    shape = {"num_hidden_layers": 12, "intermediate_size": 512, "vocab_size": 2048, "tie_word_embeddings": True}
    config = LlamaConfig(**BASE | shape)
    monkeypatch.setattr(forecasting, "_LAYER_BYTES", 1)  # few layers stand for all twelve
    found = {one.name: one for one in forecasting.forecast(config, ("q8_0",))}
    fewer = {one.name: one for one in forecasting.forecast(config, ("q8_0",), vocabulary=512)}
    per_layer = {
        "dense": 2 + 5.12,
        "S4A2E8": 2 + 2.56 + 2 * 64 / 50 + 3,
        "S2A2E8": 2 + 1.28 + 2 * 64 / 50 + 3,
        "S0A4E8N3": 2 + 256 / 50 + 3,
        "S1A1E8": 2 + 0.64 + 64 / 50 + 3,
        "S6A0E8": 2 + 3.84,
        "S4A0E8": 2 + 2.56,
        "S2A0E8": 2 + 1.28,
    }
    assert found.keys() == per_layer.keys()
    for name, seconds in per_layer.items():
        assert found[name].decode == pytest.approx(1 / (5 + 12 * seconds), rel=1e-6), name
        assert found[name].prefill == pytest.approx(10 / (5 + 12 * seconds), rel=1e-6), name
        same = "trimmed" if name == "dense" else name  # whose head takes as much less time as it has fewer tokens
        assert fewer[same].decode == pytest.approx(1 / (5 / 4 + 12 * seconds), rel=1e-6), name
        assert fewer[same].decode_ratio == pytest.approx((5 + 12 * 7.12) / (5 / 4 + 12 * seconds), rel=1e-6), name
        assert fewer[same].file_bytes < found[name].file_bytes
        assert found[name].head_share == pytest.approx(5 / (5 + 12 * seconds), rel=1e-6), name
        assert fewer[same].head_share == pytest.approx(5 / 4 / (5 / 4 + 12 * seconds), rel=1e-6), name
    assert fewer["dense"] == found["dense"]
    assert found["S4A0E8"].decode_ratio == pytest.approx((5 + 12 * 7.12) / (5 + 12 * 4.56), rel=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "said"), [(260, "has 260 tokens, so none is left out"), (0, "0 tokens is none")]
)
def test_no_more_tokens_can_stay_than_there_are_and_some_must(vocabulary, said, tmp_path):
    LlamaConfig(**BASE | {"vocab_size": 260}).save_pretrained(tmp_path)
    with pytest.raises(FactorLLMError, match=said):
        plan(str(tmp_path), ("q8_0",), vocabulary)


@pytest.mark.parametrize("takes_images", [False, True])
def test_tokens_of_a_model_that_takes_images_are_not_said_to_be_left_out(takes_images, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", timed_by(linear))
    config = LlamaConfig(**BASE | {"vocab_size": 65_536, "max_position_embeddings": 256})
    if takes_images:
        config = LlavaConfig(text_config=config, vision_config={"model_type": "clip_vision_model"})
    config.save_pretrained(tmp_path)
    assert ("see also --vocabulary" in (plan(str(tmp_path), ("q8_0",)).advice or "")) == (not takes_images)
    if takes_images:
        with pytest.raises(FactorLLMError, match=r"takes images too.*give its text model"):
            plan(str(tmp_path), ("q8_0",), 300)


def disturbed(said: dict) -> dict[str, float]:
    """As where other programs run at times: nothing of a shape without shared neurons seems to take any."""
    shared = said.get("expert_shared_feed_forward_length", said["feed_forward_length"])
    return dict.fromkeys(("decode", "prefill"), said["block_count"] * shared / 100)


@pytest.mark.parametrize("disturbances", [1, 2])
def test_times_by_which_a_shape_would_take_none_are_taken_again(disturbances, monkeypatch):
    laws = iter([*disturbances * [disturbed], linear])
    monkeypatch.setattr(forecasting, "measure_speed", lambda *asked: timed_by(next(laws))(*asked))
    config = LlamaConfig(**BASE | {"num_hidden_layers": 12, "intermediate_size": 512})
    found = {one.name: one for one in forecasting.forecast(config, ("q8_0",))}
    assert found["dense"].decode == pytest.approx(1 / (12 * 7.12))
    assert not list(laws)


def test_times_that_stay_such_are_refused(monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", timed_by(disturbed))
    config = LlamaConfig(**BASE | {"num_hidden_layers": 12, "intermediate_size": 512})
    with pytest.raises(FactorLLMError, match=r"contradict each other.*repeat the command"):
        forecasting.forecast(config, ("q8_0",))


def test_without_llamacpp_no_stand_in_is_written(monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    monkeypatch.setattr(StandIn, "write", lambda *_: pytest.fail("it is of no use"))
    with pytest.raises(FactorLLMError, match=r"llamacpp is not installed; pip install 'factorllm\[llamacpp\]'"):
        forecasting.forecast(CONFIGS["mha"])


def test_a_config_without_weights_is_enough(tmp_path):
    LlamaConfig(**BASE).save_pretrained(tmp_path)
    assert read_dense_config(str(tmp_path)).num_hidden_layers == BASE["num_hidden_layers"]


@pytest.mark.parametrize("model", ["./gone", "/gone"])
def test_a_path_is_not_looked_for_on_the_hub(model):
    with pytest.raises(FactorLLMError, match="is neither a folder"):
        read_dense_config(model)


def test_a_family_that_is_not_read_is_refused_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    with pytest.raises(FactorLLMError, match="its FFN has biases"):
        read_dense_config(str(tmp_path))


def test_fewer_layers_are_the_first_ones():
    config = CONFIGS["qwen3"]
    assert with_layers(config, 2).layer_types == config.layer_types[:2]
    assert config.num_hidden_layers == BASE["num_hidden_layers"]


def choice(name: str, decode_ratio: float, memory: int, head_share: float = 0.05) -> Choice:
    recipe = None if name in ("dense", "trimmed") else parse_recipe(name)
    expected = forecasting.Expected(name, recipe, "q8_0", 0.5, 1.0, 1.0, decode_ratio, 1.0, head_share, memory, memory)
    return Choice(expected, recipe and known_quality(recipe, "SmolLM2-135M-Instruct"), 1.0, 1.0)


OUTLOOK = Outlook(
    "SmolLM2-135M-Instruct",
    [choice("S2A2E8", 1.2, 100), choice("S0A4E8N3", 1.35, 140), choice("S4A0E8", 1.3, 70), choice("S1A1E8", 1.5, 100)],
    tokens=49_152,
)


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [
        ({"speed": 1.1}, "S0A4E8N3"),  # of those that are fast enough, the one that loses least
        ({"speed": 1.4}, "S1A1E8"),
        ({"keep": 0.85}, "S2A2E8"),
        ({"keep": 0.8}, "S0A4E8N3"),  # the fastest of those that keep so much
        ({"speed": 1.1, "memory": 100}, "S2A2E8"),
        ({}, "S1A1E8"),
    ],
)
def test_a_wish_means_a_shape(wish, chosen):
    assert OUTLOOK.choose(Wish(**wish), "q8_0").expected.name == chosen


@pytest.mark.parametrize(
    ("wish", "chosen"), [({"speed": 1.1}, "trimmed"), ({"speed": 1.15}, "S0A4E8N3"), ({"keep": 0.99}, "trimmed")]
)
def test_fewer_tokens_come_before_fewer_neurons(wish, chosen):
    outlook = Outlook(
        OUTLOOK.model, [choice("dense", 1, 120), choice("trimmed", 1.12, 90), *OUTLOOK.choices], 49_152, 300
    )
    assert outlook.choose(Wish(**wish), "q8_0").expected.name == chosen


@pytest.mark.parametrize(
    ("head_share", "tokens", "vocabulary", "advised"),
    [
        (0.24, 151_936, None, True),
        (0.05, 151_936, None, False),  # of a large model the head is little
        (0.24, 32_000, None, False),  # these are few already
        (0.24, 151_936, 32_768, False),  # it is what was asked for
    ],
)
def test_fewer_tokens_are_advised_where_the_head_takes_much(head_share, tokens, vocabulary, advised):
    outlook = Outlook("model", [choice("dense", 1, 120, head_share)], tokens, vocabulary)
    said = outlook.advice or ""
    assert bool(said) == advised
    assert ("151,936 tokens takes up to 24% of the time of a token: see also --vocabulary 32768" in said) == advised


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"speed": 2}, "as fast; the nearest is S1A1E8, which is expected to decode 1.50 times"),
        ({"keep": 0.99}, "known to keep that; the nearest is S2A2E8, which keeps 86%"),
        ({"memory": 60}, "as small; the nearest is S4A0E8"),
    ],
)
def test_a_wish_that_no_shape_fulfils_is_refused_with_the_nearest(wish, said):
    with pytest.raises(FactorLLMError, match=said):
        OUTLOOK.choose(Wish(**wish), "q8_0")


@pytest.mark.parametrize(("said", "meant"), [("90s", 90), ("60m", 3600), ("2h", 7200), ("1.5h", 5400), (30, 30)])
def test_times_are_read_with_their_unit(said, meant):
    assert Wish(time=said).time == meant


@pytest.mark.parametrize("wish", [{"time": "soon"}, {"time": "0m"}, {"memory": "16"}, {"speed": 0.9}, {"keep": 1.2}])
def test_wishes_that_mean_nothing_are_refused(wish):
    with pytest.raises(ValidationError):
        Wish(**wish)


def test_quality_is_of_the_same_model_where_there_is_any():
    assert known_quality(parse_recipe("S2A2E8"), "models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").of == "HumanEval"
    assert known_quality(parse_recipe("S2A2E8"), "some-other-model").recipe == "S2A2E8"
    assert known_quality(parse_recipe("S3A1E8"), "some-other-model").model == "SmolLM2-135M-Instruct"  # as sparse
    assert known_quality(parse_recipe("S7A0E8"), "some-other-model") is None


def test_the_command_prints_json_for_programs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forecasting, "measure_speed", timed_by(linear))
    LlamaConfig(**BASE | {"max_position_embeddings": 256}).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(sys, "argv", ["factorllm", "plan", str(tmp_path / "dense"), "--types", "q8_0", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)
    said = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in said["choices"]] == ["dense", *forecasting.RECIPES]
    assert said["choices"][0]["decode_ratio"] == 1
    assert all(one["file_bytes"] < one["memory_bytes"] for one in said["choices"])
    assert said["chosen"] == []
