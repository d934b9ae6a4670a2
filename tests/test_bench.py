"""The benchmark: what it times, what it compares, and what it writes. Never how fast."""

import json
import shutil

import pytest
from conftest import CONFIGS
from pydantic import ValidationError
from rich.console import Console
from test_export import factorized

from factorllm import FactorLLMError, factorize
from factorllm.engines import process
from factorllm.measure.cost import Cost
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.speed.plan import Plan
from factorllm.measure.speed.run import run_bench
from factorllm.measure.speed.subjects import Subject
from factorllm.measure.speed.timing import Measure

TINY = Plan(rounds=2, prompts=(8, 16), context=8, steps=2, batches=(1, 2), threads=(1,))


def subject(name: str, flops: int = 100) -> Subject:
    return Subject(name, name, None, Cost(0.5, 1, 1, flops), 1, 64)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine", "batches"), [("llamacpp", (1, 2)), pytest.param("transformers", (1,), marks=pytest.mark.slow)]
)
def test_a_comparison_from_end_to_end(engine, batches, tmp_path, text_file, small):
    """An engine in Python is started for each batch size and each model, which takes seconds."""
    timed = TINY.model_copy(update={"batches": batches})
    student = factorized(CONFIGS["mha"], tmp_path, text_file, small)
    factorize(str(tmp_path / "dense"), tmp_path / "pruned", "S4A0E8", text=str(text_file), settings=small)
    against = [str(tmp_path / "dense"), str(tmp_path / "pruned")]
    table = run_bench(str(student), against, engine, "f32", timed, tmp_path / "out", Console(quiet=True))
    assert [column.header for column in table.columns] == ["", "student", "dense", "pruned"]

    made = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [model["name"] for model in made["models"]] == ["student", "dense", "pruned"]
    assert [model["path"] for model in made["models"]] == [str(student), *against]  # no file that is gone by now
    for model in made["models"]:
        assert set(model["tokens_per_second"]) == {
            "prefill 8",
            "prefill 16",
            *(f"decode x{batch}" for batch in batches),
        }
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in model["tokens_per_second"].values())
        assert model["peak_memory_bytes"] > 10 << 20
        # Its own config does not say what share of the dense FFN runs.
        assert model["cost"].keys() == {"total_parameters", "active_parameters", "flops_per_token"}
    student_flops, dense_flops, pruned_flops = (model["cost"]["flops_per_token"] for model in made["models"])
    assert dense_flops > student_flops > pruned_flops  # the router is what the student has more
    assert made["models"][1]["ratio_to_dense"]["decode x1"] == [1, 1, 1]
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_engine_is_refused_before_files_are_written(tmp_path, text_file, small, monkeypatch):
    student = factorized(CONFIGS["mha"], tmp_path, text_file, small)
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    console = Console(record=True, width=200)
    with pytest.raises(FactorLLMError, match=r"llamacpp is not installed; pip install 'factorllm\[llamacpp\]'"):
        run_bench(str(student), [str(tmp_path / "dense")], console=console)
    assert console.export_text() == ""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("gone", "no such model"),
        ("mixed", "they would not be timed"),
        ("llama3", "silently ignores llama3 RoPE scaling"),
    ],
)
def test_a_model_that_cannot_be_timed_is_refused_before_files_are_written(last, said, tmp_path, text_file, small):
    student = factorized(CONFIGS["mha"], tmp_path, text_file, small)
    (shutil.copytree(student, tmp_path / "mixed") / "adapters/0").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    factorized(CONFIGS["llama3-rope"], tmp_path / "other", text_file, small, host="qwen2_moe").rename(
        tmp_path / "llama3"
    )
    console = Console(record=True, width=200)
    with pytest.raises(FactorLLMError, match=said):
        run_bench(str(student), [str(tmp_path / "dense"), str(tmp_path / last)], console=console)
    assert console.export_text() == ""


def test_ratios_are_medians_over_the_rounds():
    student = Measure(subject("student"), {}, {"decode x1": [10.0, 30.0, 8.0]})
    dense = Measure(subject("dense"), {}, {"decode x1": [5.0, 10.0, 8.0]})
    assert student.ratio(dense, "decode x1") == (2.0, 1.5, 2.5)
    assert student.speed("decode x1") == 10.0


def test_a_ratio_of_one_round_has_no_spread():
    student, dense = (Measure(subject(name), {}, {"decode x1": [speed]}) for name, speed in (("a", 3.0), ("b", 2.0)))
    assert student.ratio(dense, "decode x1") == (1.5, 1.5, 1.5)


def test_the_ideal_is_the_ratio_of_active_weights():
    assert subject("student", 80).ideal_over(subject("dense", 120)) == 1.5


def test_a_plan_refuses_what_it_does_not_know():
    with pytest.raises(ValidationError, match="round"):
        Plan(round=3)


def test_what_is_timed_fits_into_the_context():
    """Of 2,048 tokens, as TinyLlama's, llama.cpp reads no prompt of 2,048, for there is no room for an answer."""
    assert Plan().fitting(4096) == Plan()
    assert Plan().fitting(2048).names() == ["prefill 512", "prefill 1024", "decode x1", "decode x8"]
    short = Plan().fitting(256)
    assert (short.prompts, short.context, short.steps) == ((128,), 64, 32)
    assert FrontPlan().fitting(512).speed_plan() == FrontPlan(prompt=256, context=128).speed_plan()


@pytest.mark.engine
def test_a_model_of_a_short_context_is_timed_with_shorter_prompts(tmp_path, text_file, small):
    student = factorized(CONFIGS["mha"], tmp_path, text_file, small)
    long = TINY.model_copy(update={"prompts": (16, 64), "batches": (1,)})
    table = run_bench(str(student), [str(tmp_path / "dense")], "llamacpp", "f32", long)
    assert list(table.columns[0].cells)[:4:2] == ["prefill 16, tokens/s", "prefill 32, tokens/s"]
