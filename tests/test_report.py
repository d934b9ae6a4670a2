"""The report page and the coloured prompt: what they say, and that the page needs nothing but itself."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import BASE, save_dense
from matplotlib import pyplot
from rich.console import Console
from test_text import opening_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from factorllm import FactorLLMError, factorize
from factorllm.measure.front.show import read_front, write_picture
from factorllm.measure.routing import route_prompt, specialisation
from factorllm.measure.tasks import Score
from factorllm.report.findings import Findings, gather
from factorllm.report.measured import Measured, Scores, Speed, read_measured
from factorllm.report.page import write_report
from factorllm.report.plots import quality_figure
from factorllm.report.terminal import show_provenance
from factorllm.report.tokens import coloured_tokens, legend
from factorllm.runs.settings import Settings
from factorllm.student.read import read_provenance

QUIET = Console(quiet=True)
FRONT = Path(__file__).parents[1] / "docs" / "front" / "qwen2.5-coder-0.5b.json"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def student(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "student"
    factorize(
        str(dense_folder),
        out,
        "S2A2E8",
        text=str(text_file),
        settings=Settings(tokens=4096, held_out_tokens=512, length=64),
    )
    return out


@pytest.fixture(scope="module")
def prune(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "prune"
    settings = Settings(tokens=1024, held_out_tokens=512, length=64)
    factorize(str(dense_folder), out, "S4A0E8", text=str(text_file), settings=settings)
    return out


@pytest.fixture(scope="module")
def page(student, dense_folder, tmp_path_factory):
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("page")
    scores = {"student": {"copa": asdict(Score(0.55, 0.05, 100))}, "dense": {"copa": asdict(Score(0.6, 0.05, 100))}}
    measured = {"scores": scores, "perplexity": {"dense": 10, "student": 12}, "agreement": {"kl": 0.5, "top_1": 0.7}}
    step = {"name": "reason", "asked": 40, "given": 0.725, "own": 0.45}
    measured["chain"] = {"chain": "mine", "documents": 50, "f1": {"student": 0.3, "dense": 0.4}, "steps": [step]}
    (folder / "scores.json").write_text(json.dumps(measured))
    speeds = {"dense": 1.0, "student": 1.234, "pruned": 1.3}
    models = [
        {"name": name, "ratio_to_dense": {"decode x1": [ratio, ratio - 0.1, ratio + 0.1]}, "bytes": int(ratio * 2**27)}
        for name, ratio in speeds.items()
    ]
    (folder / "speed.json").write_text(json.dumps({"models": models}))
    measured = read_measured(folder / "scores.json", folder / "speed.json", FRONT)
    found = gather(student, str(dense_folder), measured, "cpu", QUIET)
    return write_report("tiny", found, folder / "report")


def test_the_text_that_results_are_of_is_said(student, tmp_path):
    made = read_provenance(student)
    healing = {"tokens": 99, "held_out_tokens": 77, "text": "other.txt", "settings": {}}
    healing["curve"] = [{"step": 0, "eval_loss": 1.0}]
    kind = {"data": made["data"] | {"kinds_of": "0"}}
    for change, said in (
        ({}, "512 held-out tokens{} words.txt"),
        ({"healing": healing}, "77 held-out tokens{} other.txt"),
        (kind, "512 held-out tokens{} one kind of text in words.txt"),
        (kind | {"healing": healing}, "77 held-out tokens{} other.txt"),
    ):
        found = Findings(made | change, None, [], Measured())
        page = write_report("tiny", found, tmp_path / "report").read_text()
        assert f"<caption><span>Perplexity on {said.format(' of')}.</span></caption>" in page
        console = Console(record=True, quiet=False, width=200, file=io.StringIO())
        show_provenance(console, student, made | change)
        assert f"perplexity on {said.format(':')}" in console.export_text()


def test_figures_leave_a_notebooks_way_of_showing_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "use", lambda backend: pytest.fail(f"{backend} is taken from now on"))
    monkeypatch.delitem(sys.modules, "factorllm.report.plots", raising=False)
    plots, points = import_module("factorllm.report.plots"), read_front(FRONT).points
    write_picture(points, tmp_path / "front.png")
    assert plots.as_png(plots.front_figure(points))[1:4] == (tmp_path / "front.png").read_bytes()[1:4] == b"PNG"
    assert pyplot.get_fignums() == []


def test_a_healed_student_stands_in_the_picture_at_the_speed_that_was_measured_of_it(student):
    results = read_provenance(student)["results"]
    results = {"dense": results["dense"], "student": results["student"], "healed": results["student"] | {}}
    results["pruned"] = results["dense"] | {"active_parameters": 1000}
    results["healed"]["perplexity"] = 1.5 * results["dense"]["perplexity"]

    def shown(active: int) -> dict[str, tuple[float, float]]:
        timed = {"dense": 1.0, "student": 1.2, "pruned": 1.3}
        cost = {"active_parameters": active}
        models = [{"name": name, "ratio_to_dense": {"decode x1": [to]}, "cost": cost} for name, to in timed.items()]
        speed = Speed(models=models)
        (axes,) = quality_figure(results, speed.decoding_beside(results)).axes
        return {text.get_text(): text.xy for text in axes.texts}

    assert shown(1000).keys() == {"dense", "student", "healed", "static prune"}
    assert shown(1000)["healed"] == pytest.approx((1.2, 1.5))
    assert shown(1000)["static prune"] == (1.3, 1.0)
    assert shown(1001).keys() == {"dense", "student", "healed"}  # another prune was timed than the one in the table


@pytest.mark.parametrize(("model", "more"), [("another", {}), ("student", {"more": 1})])
def test_results_that_no_table_has_a_place_for_are_refused(model, more, student, tmp_path):
    made = json.loads((student / "factorllm.json").read_text())
    made["results"].setdefault(model, {}).update(more)
    (tmp_path / "factorllm.json").write_text(json.dumps(made))
    with pytest.raises(FactorLLMError, match=rf"cannot be used \(results\.{model}"):
        read_provenance(tmp_path)


class Elements(HTMLParser):
    """All elements of a page: name and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_needs_nothing_but_itself(page):
    elements = Elements(page.read_text())
    assert elements.all("script") == [{}]  # the one that sorts tables is in the page
    links = [value for _, attributes in elements.found for key, value in attributes.items() if key in ("href", "src")]
    assert all(link.startswith(("#", "data:")) or (page.parent / link).exists() for link in links)
    assert "@import" not in page.read_text()


def test_the_page_can_be_read_by_a_screen_reader(page):
    elements = Elements(page.read_text())
    assert elements.all("html")[0]["lang"] == "en"
    assert len(elements.all("h1")) == 1
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in elements.all("svg"))
    assert len(elements.all("caption")) == len(elements.all("table"))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_says_what_was_measured(page, student):
    text, made = page.read_text(), json.loads((student / "factorllm.json").read_text())
    for row in made["results"].values():
        assert f"<td>{row['perplexity']:.2f}</td>" in text
    assert "<td>60.0 ± 5.0</td><td>55.0 ± 5.0</td><td>91.7 %</td><td>50.0 %</td>" in text
    assert "<td>40</td><td>72.5 %</td><td>45.0 %</td>" in text
    assert "measured decode speed" in text
    energy = made["layers"][0]["energy_kept"]
    assert 0.5 < energy < 1
    assert f"<td>{100 * energy:.0f} %</td>" in text
    assert text.count("<dt>dense</dt>") == text.count("<dt>student</dt>") > 0
    for name in ("quality", "routing", "error", "load", "kinds"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_that_count_come_first(page):
    text = page.read_text()
    # The dense model guesses on COPA, so what is kept of its scores there says nothing.
    wanted = [("1.23 x", "as fast as dense, decoding [1.13-1.33]"), ("70%", "kept of the likeliest next tokens")]
    wanted.append(("158 MiB", "in the file, dense 128"))
    places = [text.index(f"<dt>{what}</dt><dd>{value}</dd>") for value, what in wanted]
    assert places == sorted(places)
    assert places[-1] < text.index('href="front.png"') < text.index("Before and after")


def test_without_tasks_what_is_kept_is_of_next_tokens():
    measured = Scores(scores={"student": {}, "dense": {}}, agreement={"kl": 0.5, "top_1": 0.7})
    assert measured.kept() == (0.7, "the likeliest next tokens")
    scores = {"student": {"copa": Score(0.6, 0.02, 500)}, "dense": {"copa": Score(0.8, 0.02, 500)}}
    assert Scores(scores=scores).kept() == (pytest.approx(0.75), "the scores of copa")
    assert Scores(scores={"student": {}}).kept() is None


def test_every_expert_on_keeps_all_energy(dense_folder, text_file, tmp_path):
    settings = Settings(tokens=1024, held_out_tokens=512, length=64, baseline=False)
    summary = factorize(str(dense_folder), tmp_path / "all", "S2A6E8", text=str(text_file), settings=settings)
    assert all(layer["energy_kept"] == pytest.approx(1, abs=1e-5) for layer in summary.layers)


def test_a_static_prune_has_no_experts_to_report(prune, tmp_path):
    found = gather(prune, None, Measured(), "cpu", QUIET)
    text = write_report("prune", found, tmp_path).read_text()
    assert "specialise" not in text
    assert "<dt>dense</dt>" not in text
    assert not (tmp_path / "load.png").exists()
    with pytest.raises(FactorLLMError, match="static prune"):
        route_prompt(prune, "words")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in the path")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_in_chromium_without_errors_and_fits(page, width):
    size = f"--window-size={width},2000"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", size, "--enable-logging=stderr", "--dump-dom"]
    found = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "</main>" in found.stdout
    assert "CONSOLE" not in found.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in the path")
def test_tables_are_sorted_by_a_press_on_a_head(page, tmp_path):
    press = """<script>
    const head = document.querySelectorAll("table")[0].querySelectorAll("th button")[1];
    head.click(); head.click();
    document.title = [...document.querySelectorAll("tbody")[0].rows].map((row) => row.cells[1].textContent).join(" ")
      + " " + head.closest("th").getAttribute("aria-sort");
    </script></body>"""
    (tmp_path / "page.html").write_text(page.read_text().replace("</body>", press))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    *numbers, order = shown.split("<title>")[1].split("</title>")[0].split()
    assert [float(number) for number in numbers] == sorted(map(float, numbers), reverse=True)
    assert order == "descending"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be used"),
        (None, "cannot be used"),
        ('{"other": 1}', "cannot be used"),
        ("[]", "cannot be used"),
        ("5", "cannot be used"),
        ('{"scores": 5}', "cannot be used"),
        ('{"scores": {"student": {"copa": {"value": "good"}}}}', "cannot be used"),
        ('{"scores": {"dense": {}}}', "has no scores of a student"),
        ('{"scores": {"student": {"odd": {"value": 1, "error": 0, "questions": 1}}}}', "has no scores of a student"),
        (
            '{"scores": {"dense": {}, "student": {"copa": {"value": 1, "error": 0, "questions": 1}}}}',
            "dense model on the same tasks",
        ),
    ],
)
def test_unreadable_numbers_are_refused(student, tmp_path, content, says):
    path = tmp_path / "scores.json"
    if content:
        path.write_text(content)
    with pytest.raises(FactorLLMError, match=says):
        read_measured(path, None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"models": [{"name": "dense", "ratio_to_dense": {"decode x8": [1, 1, 1]}}]}, "no decode speed at batch 1"),
        ({"models": [{"name": "dense", "ratio_to_dense": {"decode x1": []}}]}, "no decode speed at batch 1"),
        ({"models": []}, "no decode speed at batch 1"),
        ({"models": [{"name": "dense"}]}, "cannot be used"),
        ({"models": [{"name": "dense", "ratio_to_dense": {"decode x1": ["fast"]}}]}, "cannot be used"),
        ({"models": 1}, "cannot be used"),
        ({"scores": {}}, "cannot be used"),
    ],
)
def test_speeds_that_are_none_are_refused(student, tmp_path, content, says):
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FactorLLMError, match=says):
        read_measured(None, path)


def test_what_the_report_cannot_run_on_is_refused(student, tmp_path):
    with pytest.raises(FactorLLMError, match="device 'abacus' cannot be used"):
        gather(student, None, Measured(), "abacus", QUIET)
    save_dense(LlamaConfig(**BASE | {"vocab_size": 300}), tmp_path / "other")
    with pytest.raises(FactorLLMError, match="knows 300 tokens and the student 258"):
        gather(student, str(tmp_path / "other"), Measured(), "cpu", QUIET)


def test_a_score_of_one_question_has_no_error(student, tmp_path):
    path = tmp_path / "scores.json"
    scores = {"student": {"copa": asdict(Score(1.0, None, 1))}, "dense": {"copa": asdict(Score(0.0, None, 1))}}
    path.write_text(json.dumps({"scores": scores}))
    found = gather(student, None, read_measured(path, None), "cpu", QUIET)
    assert "<td>0.0</td><td>100.0</td>" in write_report("tiny", found, tmp_path / "report").read_text()


def loads(*experts: int) -> torch.Tensor:
    """Picks (n, 1 layer, 4 experts) of tokens that run one expert each."""
    return torch.nn.functional.one_hot(torch.tensor(experts), 4)[:, None].bool()


def test_specialisation_of_kinds_that_share_no_expert():
    found = specialisation({"one": loads(0, 1, 0, 1), "other": loads(2, 3, 2, 3)})
    assert (found.between, found.within) == (1, 0)
    assert found.loads["one"].tolist() == [[0.5, 0.5, 0, 0]]


def test_specialisation_of_kinds_that_are_alike():
    found = specialisation({"one": loads(0, 1, 2, 3), "other": loads(0, 1, 2, 3)})
    assert found.between == found.within == 1  # halves differ as much within a kind as between kinds


@pytest.mark.parametrize("opens", [False, True])
def test_a_prompt_runs_the_experts_that_the_model_runs(opens, student, tmp_path):
    """The model's own choice, seen at its router, is the one that is shown, behind what its tokenizer begins with."""
    if opens:
        student = shutil.copytree(student, tmp_path / "student")
        opening_tokenizer().save_pretrained(student)
    routed = route_prompt(student, "the expert of the router", layer=1)
    model = AutoModelForCausalLM.from_pretrained(student)
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    seen = []
    routers[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    prompt = AutoTokenizer.from_pretrained(student)("the expert of the router", return_tensors="pt")
    with torch.inference_mode():
        model(**prompt)
    chosen = next(part for part in seen[0] if part.dtype == torch.int64)
    wanted = [set(row) for row in chosen.tolist()[opens:]]
    assert [set(row.nonzero().flatten().tolist()) for row in routed.picks] == wanted
    assert "".join(routed.pieces) == "the expert of the router"


@pytest.mark.parametrize("prompt", [" ", "\0", "\ud83d", "[red]\\[/]", "\u202e\u200b\x1b[2J", "</s><s>"])
def test_odd_prompts_are_shown(student, prompt):
    routed = route_prompt(student, prompt)
    Console(quiet=True).print(coloured_tokens(routed, in_colour=True), legend(routed, in_colour=False))
    assert len(routed.pieces) == len(routed.picks) > 0


def test_the_coloured_prompt_is_the_prompt(student):
    routed = route_prompt(student, "the expert of the router")
    assert coloured_tokens(routed, in_colour=True).plain == "the expert of the router"
    plain = coloured_tokens(routed, in_colour=False).plain
    assert re.sub(r"\[\d,\d\]", "", plain) == "the expert of the router"
    assert legend(routed, in_colour=True).plain == legend(routed, in_colour=False).plain
    assert legend(routed, in_colour=True).plain.startswith("layer 1, share of tokens:  expert 0 ")


@pytest.mark.parametrize(("prompt", "layer", "says"), [("", None, "prompt is empty"), ("words", 3, "0, 1, 2")])
def test_prompts_that_cannot_be_shown_are_refused(student, prompt, layer, says):
    with pytest.raises(FactorLLMError, match=says):
        route_prompt(student, prompt, layer)
