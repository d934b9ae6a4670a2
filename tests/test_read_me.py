"""Read-ME: a prune for each kind of text, and what chooses among them before any layer runs."""

import errno
import json
import random
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from conftest import CONFIGS, comes_true, served
from test_export import byte_level_tokenizer, save_model

from factorllm import (
    EvalSettings,
    FactorLLMError,
    HealSettings,
    ServeSettings,
    Settings,
    evaluate,
    factorize,
    heal,
    serve,
)
from factorllm import (
    front as measure_front,
)
from factorllm.cli.terminal import console
from factorllm.convert.partition import keep_top_energy
from factorllm.dense.ffn import FFN
from factorllm.dense.safetensors import open_folder
from factorllm.recipe import Shape, parse_read_me, parse_recipe
from factorllm.runs.output import CHECKPOINT, check_output
from factorllm.serving import kinds as serving
from factorllm.serving.backend import Backend
from factorllm.serving.kinds import KindFront
from factorllm.serving.proxy import UnavailableError, text_of
from factorllm.student.read import load_student, read_provenance
from factorllm.text.intuition import Intuition
from factorllm.text.kinds import read_text_of_kinds

KINDS = ("for while return import class self", "sea ship wind sail harbour wave", "flour oven sugar bake cake bread")
SETTINGS = Settings(tokens=3072, held_out_tokens=768, length=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of three kinds, of other words each."""
    chooser, path = random.Random(0), tmp_path_factory.mktemp("kinds") / "text.jsonl"
    documents = [" ".join(chooser.choices(words.split(), k=40)) for _ in range(24) for words in KINDS]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    save_model(CONFIGS["gqa-tied"], folder)
    return folder


@pytest.fixture(scope="module")
def made(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return out, factorize(str(dense), out, "read-me:K3", text=text, settings=SETTINGS)


def kind_of(document: str) -> int:
    return max(range(len(KINDS)), key=lambda kind: sum(word in KINDS[kind].split() for word in document.split()))


def test_recipes():
    assert parse_read_me("read-me:K4").prune == parse_recipe("S4A0E8")
    assert parse_read_me("read-me:k2:S3A0E4").name == "read-me:K2:S3A0E4"
    assert parse_read_me("S2A2E8") is None
    for wrong in ("read-me", "read-me:K1", "read-me:K999", "read-me:4"):
        with pytest.raises(FactorLLMError, match="write read-me:K4"):
            parse_read_me(wrong)
    with pytest.raises(FactorLLMError, match="use a static prune such as S4A0E8"):
        parse_read_me("read-me:K4:S2A2E8")
    with pytest.raises(FactorLLMError, match="which only `factorize` does"):
        parse_recipe("read-me:K4")


def test_sequences_are_of_one_kind_each_and_mixed_among_each_other(text):
    read = read_text_of_kinds(text, byte_level_tokenizer(), SETTINGS, 3)
    found = byte_level_tokenizer().batch_decode(read.calibration, skip_special_tokens=True)
    pairs = {(kind_of(sequence), kind) for sequence, kind in zip(found, read.kinds.tolist(), strict=True)}
    assert len(pairs) == 3
    assert {kind for _, kind in pairs} == {kind for kind, _ in pairs} == {0, 1, 2}
    assert sum(first != second for first, second in pairwise(read.kinds.tolist())) > len(read.kinds) // 3
    learned = "".join(found)
    for sequence in byte_level_tokenizer().batch_decode(read.held_out, skip_special_tokens=True):
        assert sequence[10:40] not in learned


def test_a_text_too_short_for_the_kinds_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("one document\n\nanother one\n")
    with pytest.raises(FactorLLMError, match="has 2 documents, in which 3 kinds cannot be found"):
        read_text_of_kinds(str(path), byte_level_tokenizer(), SETTINGS, 3)


def test_a_kind_of_one_document_is_cut_and_that_is_told(tmp_path):
    """Its model is measured on a part of what it learned from."""
    chooser, path = random.Random(0), tmp_path / "text.jsonl"
    books = [" ".join(chooser.choices(words.split(), k=400)) for words in KINDS]
    path.write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    read = read_text_of_kinds(str(path), byte_level_tokenizer(), SETTINGS, 3)
    assert read.cut
    assert read.origin == "text.jsonl (held-out and calibration text are cut from one document)"


def test_neurons_of_a_kind_are_those_of_its_own_energy_and_a_little_of_all():
    torch.manual_seed(0)
    ffn = FFN(None, torch.eye(4), torch.eye(4))
    own = torch.tensor([True, False, False, False])
    shape = Shape(4, 2, 0, 2, 0)
    for third, chosen in ((2.0, [0, 2]), (1.2, [0, 3])):  # of its own energy 29 %, and 13 %
        hidden = torch.tensor([[3.0, 1.0, third, 0.0], *[[0.0, 2.0, 0.0, 9.0]] * 3])
        assert keep_top_energy(ffn, hidden, shape).shared.tolist() == [0, 3]
        assert keep_top_energy(ffn, hidden, shape, own).shared.tolist() == chosen


def test_each_kind_is_a_checkpoint_of_its_own_and_the_prompt_chooses_it(made, text, dense):
    out, summary = made
    assert [row.name for row in summary.rows] == ["dense", "student", "pruned"]
    assert summary.recipe.name == "read-me:K3:S4A0E8"
    intuition = Intuition.load(out)
    assert intuition.kinds == 3
    for kind in range(3):
        folder = out / "kinds" / str(kind)
        assert read_provenance(folder)["recipe"]["active"] == 0
        model = load_student(folder)
        assert model.config.intermediate_size == CONFIGS["gqa-tied"].intermediate_size // 2
    read = read_text_of_kinds(text, byte_level_tokenizer(), SETTINGS, 3)
    prompts = byte_level_tokenizer().batch_decode(read.held_out, skip_special_tokens=True)
    chosen = [int(intuition.probabilities(prompt).argmax()) for prompt in prompts]
    assert sum(a == b for a, b in zip(chosen, read.held_out_kinds.tolist(), strict=True)) > 0.8 * len(chosen)
    assert json.loads((out / "factorllm.json").read_text())["chosen_as_found"] > 0.8


def test_kinds_keep_other_neurons(made):
    kept = [json.loads((made[0] / "kinds" / str(kind) / "factorllm.partition.json").read_text()) for kind in range(3)]
    assert kept[0] != kept[1] != kept[2]


def test_what_wants_one_model_refuses_the_folder(made):
    for ask in (read_provenance, lambda folder: open_folder(folder, "it")):
        with pytest.raises(FactorLLMError, match=r"a model for each kind of text.*kinds/0.*factorllm serve"):
            ask(made[0])


def test_a_kind_is_not_healed_or_measured_on_the_text_that_it_was_found_in(made, dense, text, tmp_path):
    """Which of its documents a kind was made from is known only where all kinds are looked for."""
    kind, copy = str(made[0] / "kinds" / "0"), shutil.copy(text, tmp_path / "copy.jsonl")
    settings = HealSettings(tokens=256, validation_tokens=64, learning_rate=1e-5, evaluations=1)
    says = r"made from some documents of .*\.jsonl, those of its kind"
    with pytest.raises(FactorLLMError, match=says):
        heal(kind, str(dense), tmp_path / "healed", text=text, settings=settings)
    with pytest.raises(FactorLLMError, match=says):
        evaluate(kind, text=str(copy), settings=EvalSettings(tasks=()))
    with pytest.raises(FactorLLMError, match=says):
        measure_front([], [str(dense), kind], text, tmp_path / "front")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(Path(text).read_text().splitlines(keepends=True))))
    heal(kind, str(dense), tmp_path / "healed", text=str(other), settings=settings)
    with pytest.raises(FactorLLMError, match=says):
        evaluate(tmp_path / "healed", text=text, settings=EvalSettings(tasks=()))


def test_it_is_not_made_again_and_is_replaceable(made, dense, text):
    out, summary = made
    again = factorize(str(dense), out, "read-me:K3", text=text, settings=SETTINGS, console=console)
    assert again.done_already
    assert again.rows == summary.rows
    check_output(out, CHECKPOINT)
    with pytest.raises(FactorLLMError, match="--overwrite"):
        factorize(str(dense), out, "read-me:K2", text=text, settings=SETTINGS)


def test_a_killed_run_ends_with_the_same_bytes(made, dense, text, tmp_path, monkeypatch):
    from factorllm.convert import factorize as module

    write = module.write_layer

    def dies(job, student, index, ffn):
        if index == 1 and student.kind == 2:
            raise KeyboardInterrupt
        write(job, student, index, ffn)

    monkeypatch.setattr(module, "write_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        factorize(str(dense), tmp_path / "out", "read-me:K3", text=text, settings=SETTINGS)
    monkeypatch.undo()
    factorize(str(dense), tmp_path / "out", "read-me:K3", text=text, settings=SETTINGS)
    files = {path.relative_to(made[0]) for path in made[0].rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name in files - {name for name in files if name.name == "factorllm.run.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_what_it_cannot_take_is_refused(dense, text, tmp_path):
    with pytest.raises(FactorLLMError, match="give some with --text"):
        factorize(str(dense), tmp_path / "out", "read-me:K3", settings=SETTINGS)
    with pytest.raises(FactorLLMError, match="leave --images out"):
        factorize(str(dense), tmp_path / "out", "read-me:K3", text=text, images=tmp_path, settings=SETTINGS)


def test_the_general_prune_can_be_left_out(dense, text, tmp_path):
    settings = replace_settings(baseline=False, tune=1)
    summary = factorize(str(dense), tmp_path / "out", "read-me:K2", text=text, settings=settings)
    assert [row.name for row in summary.rows] == ["dense", "student"]


def replace_settings(**changes) -> Settings:
    return SETTINGS.model_copy(update=changes)


def prompt_of(kind: int, number: int) -> str:
    chooser = random.Random(f"{kind} {number}")
    return " ".join(chooser.choices(KINDS[kind].split(), k=8))[:40]


def read_metrics(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines())}


@pytest.mark.engine
def test_it_is_served_at_one_address(made):
    """By llama.cpp's own servers, of which one fits: the prompt chooses, and requests at once are all answered."""
    options = (
        "--type",
        "f32",
        "--context",
        "64",
        "--parallel",
        "2",
        "--in-memory",
        "1",
        "--wait-limit",
        "300",
        "--threads",
        "1",
    )
    intuition = Intuition.load(made[0])
    asked = [prompt_of(kind, number) for number in range(4) for kind in range(3)]
    chosen = [int(intuition.probabilities(prompt).argmax()) for prompt in asked]
    assert set(chosen) == {0, 1, 2}
    with served(str(made[0]), *options) as (client, _):
        model = client.models.list().data[0].id
        assert model == made[0].name

        def metrics() -> dict[str, float]:
            with urlopen(str(client.base_url).replace("/v1/", "/metrics")) as reply:
                return read_metrics(reply.read().decode())

        def ask(prompt: str) -> str:
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
            assert answer.model == model
            return answer.choices[0].text

        first = [ask(prompt) for prompt in asked[:3]]
        for kind in range(3):
            assert metrics()[f'factorllm_started_total{{kind="{kind}"}}'] == chosen[:3].count(kind)
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, asked))
        assert answers[:3] == first
        found = metrics()
        assert found["factorllm_hits_total"] + found["factorllm_misses_total"] == 15
        assert found["factorllm_loads_total"] == found["factorllm_misses_total"] >= 3
        assert sum(found[f'factorllm_in_memory{{kind="{kind}"}}'] for kind in range(3)) == 1
        assert found["factorllm_wait_seconds_max"] < 300
        words = {"role": "user", "content": asked[0]}
        stream = client.chat.completions.create(model=model, messages=[words], max_tokens=4, stream=True)
        assert [piece.choices[0].finish_reason for piece in stream][-1] in ("length", "stop")
        running = [f'factorllm_running{{kind="{kind}"}}' for kind in range(3)]
        assert comes_true(lambda: [metrics()[name] for name in running] == [0, 0, 0])


@pytest.fixture(params=[FactorLLMError, OSError])
def front(request, made, monkeypatch):
    """With servers that are none, one of which fails."""

    class Fake:
        is_alive = True

        def __init__(self, path, options, name):
            if path.name == "2":
                raise request.param("it cannot be loaded")
            self.address = f"http://{path.name}"

        def close(self):
            self.is_alive = False

    monkeypatch.setattr(serving, "Backend", Fake)
    settings = ServeSettings(in_memory=1)
    return KindFront("it", [Path(str(kind)) for kind in range(3)], Intuition.load(made[0]), settings)


def prompts(front: KindFront) -> list[dict]:
    """A request of each kind, by the kind's number."""
    found = {int(front._intuition.probabilities(prompt_of(kind, 0)).argmax()): kind for kind in range(3)}
    return [{"prompt": prompt_of(found[kind], 0)} for kind in range(3)]


def test_a_server_that_ended_is_started_again(front):
    body = prompts(front)[0]
    for _ in range(2):
        with front.place("/v1/completions", body) as (address, sent):
            assert address == "http://0"
            assert sent == body
            front._backends[0].close()
    assert read_metrics(front.metrics())["factorllm_loads_total"] == 2


def test_a_model_that_cannot_be_loaded_is_told_and_the_others_go_on(front):
    bodies = prompts(front)
    with pytest.raises(UnavailableError, match="it cannot be loaded"), front.place("/v1/completions", bodies[2]):
        pass
    with front.place("/v1/completions", bodies[1]) as (address, _):
        assert address == "http://1"
    assert not any(front._schedule.queued)


def test_a_server_that_cannot_be_started_is_told_too(front, monkeypatch):
    def none_left(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    body, own = prompts(front)[0], serving.Backend
    monkeypatch.setattr(serving, "Backend", Backend)
    with monkeypatch.context() as full:
        full.setattr(subprocess, "Popen", none_left)
        with (
            pytest.raises(UnavailableError, match="no process can be started to load 0: Too many open files"),
            front.place("/v1/completions", body),
        ):
            pass
    monkeypatch.setattr(serving, "Backend", own)
    with front.place("/v1/completions", body) as (address, _):
        assert address == "http://0"


def test_one_waits_until_there_is_a_slot(front):
    body, got = prompts(front)[0], threading.Event()

    def second():
        with front.place("/v1/completions", body):
            got.set()

    with front.place("/v1/completions", body):
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.2)
    assert got.wait(10)
    thread.join()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a\nb"),
        ({"prompt": [1, 2]}, ""),
        ({"messages": [{"role": "system", "content": "a"}, {"content": [{"type": "text", "text": "b"}]}]}, "a\nb"),
        ({"messages": "a"}, ""),
        ({"messages": [None, {"content": None}, {"content": [{"image_url": {}}]}]}, ""),
    ],
)
def test_what_a_request_says(body, said):
    assert text_of(body) == said


def test_other_engines_are_refused(made):
    with pytest.raises(FactorLLMError, match=r"use --engine llamacpp, or serve one of them: .*kinds/0"):
        serve(str(made[0]), "vllm")
