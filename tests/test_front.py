"""Students beside all that quantisation alone gives."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from conftest import CONFIGS, words
from test_export import factorized

from factorllm import FactorLLMError, factorize
from factorllm.engines import process
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.front.points import Point, Timed, ahead, decode_time, mean_score, mebibytes, plain_loss
from factorllm.measure.front.run import run_front
from factorllm.measure.front.show import front_table, read_front
from factorllm.measure.settings import EvalSettings
from factorllm.measure.tasks import Score
from factorllm.report.plots import as_svg, front_figure
from factorllm.runs.settings import Settings

TINY = FrontPlan(
    types=("f16", "q4_0"),
    importance_tokens=128,
    perplexity_tokens=128,
    rounds=2,
    prompt=8,
    context=8,
    steps=2,
    threads=1,
)


def point(kind: str, decode: float, size: int, perplexity: float, **scores: float) -> Point:
    timed = Timed((1, 1, 1), (decode, decode, decode))
    found = {task: Score(value, 0.01, 1000) for task, value in scores.items()}
    return Point(kind, kind, "q8_0", size << 20, 8.5, timed, perplexity, found)


def test_quantisation_gives_what_costs_no_more_and_what_lies_between_two_files():
    plain = [(4, 10), (2, 14), (1, 30)]
    assert plain_loss(5, plain) == 10
    assert plain_loss(2, plain) == 14
    assert plain_loss(3, plain) == 12  # half of the tensors in each of two types
    assert plain_loss(1.5, plain) == 22
    assert plain_loss(0.5, plain) == math.inf
    # A file that is worse than a mix of two others is not on the hull.
    assert plain_loss(2, [(4, 10), (2, 25), (1, 30)]) == pytest.approx(30 - 20 / 3)


def test_a_student_is_ahead_by_the_perplexity_that_it_saves():
    dense = [point("dense", 1, 400, 10), point("dense", 2, 200, 20)]
    student = point("student", 4 / 3, 400, 12)  # 3/4 of a token's time: half of the way
    assert ahead(student, [*dense, student], decode_time) == pytest.approx(15 / 12 - 1)
    assert ahead(student, [*dense, student], mebibytes) == pytest.approx(10 / 12 - 1)
    assert ahead(point("student", 3, 100, 99), dense, decode_time) == math.inf


def test_the_legend_has_every_name_as_it_is():
    names = ["_made", "a $\\frac{$ b", "$5 or $6"]
    points = [point("dense", 1, 100, 10), *(replace(point("student", 1.2, 90, 11), model=name) for name in names)]
    figure = front_figure(points)
    shown = [text.get_text().lstrip("\u200b") for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["dense", *(f"{name} (student)" for name in names)]
    assert "$5 or $6 (student)</text>" in as_svg(figure, "front", "a front")


def test_a_mean_leaves_out_what_the_dense_model_guesses():
    dense = point("dense", 1, 1, 1, boolq=0.4, arc_easy=0.6)
    assert mean_score(point("student", 1, 1, 1, boolq=0.9, arc_easy=0.5), dense) == 0.5
    assert mean_score(point("student", 1, 1, 1, boolq=0.9), point("dense", 1, 1, 1, boolq=0.4)) is None


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_file):
    """A student, its dense model, a static prune, and a text long enough."""
    root, small = tmp_path_factory.mktemp("front"), Settings(tokens=2048, held_out_tokens=512, length=64)
    factorized(CONFIGS["mha"], root, text_file, small).rename(root / "student")
    factorize(str(root / "dense"), root / "pruned", "S4A0E8", text=str(text_file), settings=small)
    shutil.copytree(root / "student", root / "other")
    shutil.copytree(root / "student", root / "mixed")
    (root / "mixed/adapters/0").mkdir(parents=True)
    made = json.loads((root / "other/factorllm.json").read_text())
    made["settings"]["seed"] = 1
    (root / "other/factorllm.json").write_text(json.dumps(made))
    (root / "text.txt").write_text("\n\n".join(words(40, seed) for seed in range(400)))
    return root


@pytest.mark.engine
def test_every_model_is_measured_in_every_type_and_nothing_twice(models, tmp_path, monkeypatch):
    against = [str(models / "dense"), str(models / "pruned")]
    given = [str(models / "student")], against, str(models / "text.txt"), tmp_path / "out", TINY
    front = run_front(*given, cache=tmp_path / "cache")
    found = {(point.model, point.file_type): point for point in front.points}
    assert list(found) == [(name, kind) for name in ("dense", "student", "pruned") for kind in ("f16", "q4_0")]
    for each in front.points:
        assert (tmp_path / "out" / f"{each.model}-{each.file_type}.gguf").stat().st_size == each.size
        assert each.perplexity > 1
        assert min(each.timed.decode + each.timed.prefill) > 0
    for model in ("dense", "student", "pruned"):
        assert found[model, "q4_0"].bits < found[model, "f16"].bits
        assert found[model, "q4_0"].perplexity != found[model, "f16"].perplexity
    assert found["pruned", "f16"].size < found["dense", "f16"].size
    made = json.loads((tmp_path / "out" / "front.json").read_text())
    assert [each["perplexity"] for each in made["points"]] == [each.perplexity for each in front.points]
    assert read_front(tmp_path / "out" / "front.json").points == front.points
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert len(front_table(front).rows) == 6

    for measured in ("front.run.measure_speed", "gguf_subject.GgufSubject.follow"):
        monkeypatch.setattr(f"factorllm.measure.{measured}", lambda *_: pytest.fail("it was measured again"))
    assert run_front(*given, cache=tmp_path / "cache").points == front.points


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"students": ["dense"]}, "dense is a dense or pruned model; give students first"),
        ({"against": ["student"]}, "student is a student; give students first"),
        ({"students": ["student", "student"]}, "two models are called student"),
        ({"plan": FrontPlan(types=("q9",))}, "no type 'q9'"),
        ({"students": ["mixed"]}, "mixed holds an adapter for each kind of text, and they would not be timed"),
        ({"students": ["student", "other"]}, "student was made with seed 0 and other with 1"),
        ({"settings": EvalSettings(tasks=("arc",))}, "unknown task 'arc'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(change, said, models, tmp_path):
    given = {"students": ["student"], "against": ["dense"], "plan": TINY} | change
    paths = {name: [str(models / path) for path in given.pop(name)] for name in ("students", "against")}
    with pytest.raises(FactorLLMError, match=said):
        run_front(**paths, text=str(models / "text.txt"), out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_without_llamacpp_nothing_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(FactorLLMError, match=r"llamacpp is not installed; pip install 'factorllm\[llamacpp\]'"):
        run_front([models / "student"], [models / "dense"], models / "text.txt", tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_numbers_of_the_users_are_not_replaced(models, tmp_path):
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(FactorLLMError, match=r"front\.json exists already and was not made by factorllm"):
        run_front([str(models / "student")], [str(models / "dense")], str(models / "text.txt"), tmp_path, TINY)
    assert (tmp_path / "front.json").read_text() == "{}"
