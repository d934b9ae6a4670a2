"""`factorllm make`: from a wish to a model that is used; killed anywhere it goes on, and nothing is lost."""

import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml
from conftest import BASE, save_dense, served
from forked import command, ended
from rich.console import Console
from test_export import byte_level_tokenizer, save_model
from test_plan import linear, run_and_timed_by, timed_by
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, LlamaConfig, Olmo2Config

from factorllm import FactorLLMError, HealSettings, MakePlan, ServeSettings, Settings, Wish, export, make, make_planned
from factorllm.cli import main
from factorllm.dense import open_model
from factorllm.engines import process
from factorllm.exporting.ready import as_gguf
from factorllm.making.card import commands
from factorllm.making.choose import choose_plan
from factorllm.making.modelfile import modelfile
from factorllm.making.place import Place
from factorllm.making.plan_file import ExportStep, SampleStep, read_plan
from factorllm.making.run import _run
from factorllm.making.steps import Progress, Work
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.settings import EvalSettings
from factorllm.measure.speed.plan import Plan
from factorllm.planning import forecast as forecasting
from factorllm.serving.chat import Chat
from factorllm.student.read import read_provenance

PLAN = {
    "recipe": "S2A2E8",
    "factorize": Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False),
    "heal": HealSettings(tokens=2048, validation_tokens=512, evaluations=2, learning_rate=1e-3),
    "export": ExportStep(type="q8_0"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    save_model(LlamaConfig(**BASE | {"num_hidden_layers": 4, "max_position_embeddings": 256}), folder)
    return folder


@pytest.fixture(scope="module")
def plan(dense, text_file):
    return MakePlan(model=str(dense), text=str(text_file), **PLAN)


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory):
    """What a run made that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "made"
    out.mkdir()
    plan.write(out / "plan.yaml")
    return make_planned(out / "plan.yaml")


def model_bytes(out: Path) -> dict[str, bytes]:
    """The checkpoint's weights and config."""
    files = [*(out / "checkpoint").glob("*.safetensors"), out / "checkpoint" / "config.json"]
    return {path.name: path.read_bytes() for path in files}


def files_in(out: Path) -> set[tuple[Path, int]]:
    """Every file with its size."""
    found = set()
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):  # what is moved just now
            found.add((path, path.stat().st_size))
    return found


def test_everything_is_there(made):
    out = made.out
    for name in ("plan.yaml", "checkpoint/config.json", "Modelfile", "README.md", "scores.json", "report/index.html"):
        assert (out / name).is_file(), name
    assert (out / "made-q8_0.gguf").is_file()
    size = (out / "made-q8_0.gguf").stat().st_size
    assert made.numbers == [
        (ANY, "kept of the likeliest next tokens"),  # the plan times nothing
        (f"{size / 2**20:.0f} MiB", "in the file"),
    ]
    card = (out / "README.md").read_text()
    assert f"factorllm chat {out}" in card
    assert "kept of the likeliest next tokens" in card


def test_commands_run_as_they_are_said_whatever_the_folder_is_called(plan, tmp_path):
    out = tmp_path / "Mine [v1] of März"
    used = commands(Place(out, plan.model_copy(update={"model": "a dense"})))
    assert [shlex.split(each) for each in used] == [
        ["factorllm", "chat", str(out)],
        ["factorllm", "serve", str(out / f"{out.name}-q8_0.gguf")],
        ["factorllm", "eval", str(out / "checkpoint"), "--against", "a dense"],
        ["ollama", "create", "mine-v1-of-m-rz", "-f", str(out / "Modelfile")],
    ]
    plan.write(out.parent / "my plan.yaml")
    head = (out.parent / "my plan.yaml").read_text().splitlines()[0]
    assert f"`factorllm make '{out.parent / 'my plan.yaml'}'`" in head


def test_killed_twice_it_ends_with_the_same_bytes(plan, made, tmp_path):
    out, chooser = tmp_path / "made", random.Random(0)
    out.mkdir()
    plan.write(out / "plan.yaml")
    words = ("make", out / "plan.yaml")
    for _ in range(2):
        before = files_in(out)
        process = command(*words)
        while files_in(out) == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chooser.uniform(0, 3))
        assert process.poll() in (None, 0), process.said()
        process.kill()
        process.wait()
    done = ended(command(*words))
    assert done.returncode == 0, done.stderr
    assert "all is done in about" in done.stdout or "made already" in done.stdout
    assert model_bytes(out) == model_bytes(made.out)
    assert (out / "made-q8_0.gguf").read_bytes() == (made.out / "made-q8_0.gguf").read_bytes()
    again = ended(command(*words))
    assert again.returncode == 0, again.stderr
    assert "made already" in again.stdout


def test_an_edited_plan_is_made_instead(plan, tmp_path):
    out = tmp_path / "made"
    out.mkdir()
    short = plan.model_copy(update={"heal": None})
    short.write(out / "plan.yaml")
    first = make_planned(out / "plan.yaml")
    before = (out / "made-q8_0.gguf").stat().st_size
    path = out / "plan.yaml"
    path.write_text(path.read_text().replace("S2A2E8", "S4A0E8"))
    second = make_planned(path)
    assert (first.plan.recipe, second.plan.recipe) == ("S2A2E8", "S4A0E8")
    assert (out / "made-q8_0.gguf").stat().st_size < before
    assert "LlamaForCausalLM" in (out / "checkpoint" / "config.json").read_text()


def test_a_model_or_a_text_that_changed_is_worked_on_again(tmp_path):
    save_model(LlamaConfig(**BASE), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("words")
    plan = MakePlan(model=str(tmp_path / "dense"), text=str(tmp_path / "text.txt"), **PLAN | {"heal": None})
    (tmp_path / "steps").mkdir()

    def is_done() -> bool:
        work = Work(plan, tmp_path, Console(quiet=True))
        return Progress(work, work.steps()).is_done(work.steps()[0])

    work = Work(plan, tmp_path, Console(quiet=True))
    Progress(work, work.steps()).mark(work.steps()[0])
    assert not is_done()  # what it leaves is not there
    work.at.checkpoint.mkdir()
    assert not is_done()  # nor is all of it
    (work.at.checkpoint / "config.json").touch()
    assert is_done()
    (tmp_path / "text.txt").write_text("other words")
    assert not is_done()
    (tmp_path / "text.txt").write_text("words")
    assert is_done()
    template = tmp_path / "dense" / "chat_template.jinja"
    before = template.read_text() if template.exists() else None
    template.write_text("{{ messages }}")
    assert not is_done()
    template.unlink() if before is None else template.write_text(before)
    assert is_done()
    save_dense(LlamaConfig(**BASE | {"vocab_size": 300}), tmp_path / "dense", seed=1)
    assert not is_done()


def test_what_decides_a_step_is_known_wherever_it_stands(tmp_path):
    """A data set has no file, a recipe's file another content, and how a text is sampled is said in two places."""
    save_model(LlamaConfig(**BASE), tmp_path / "dense")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{shared: 2, active: 2, parts: 8}")
    given = {"model": str(tmp_path / "dense"), "recipe": str(recipe), "text": "some/texts"}
    sampled = given | {"text": None, "sample": SampleStep(tokens=512)}

    def keys(**said) -> list[str]:
        work = Work(MakePlan(**said), tmp_path, Console(quiet=True))
        return list(Progress(work, work.steps())._keys.values())

    assert keys(**given) == keys(**given)
    assert not set(keys(**given)) & set(keys(**given | {"text": "other/texts"}))
    for other in ({"seed": 1}, {"length": 256}):
        assert not set(keys(**sampled)) & set(keys(**sampled, factorize=Settings(**other)))
    assert keys(**sampled)[0] == keys(**sampled, factorize=Settings(tune=1))[0]
    before = keys(**given)
    recipe.write_text("{shared: 2, active: 1, parts: 8}")
    assert not set(before) & set(keys(**given))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": ExportStep(type="q4_k_m")}, "no type 'q4_k_m'"),
        ({"evaluate": EvalSettings(tasks=("other",))}, "unknown task 'other'"),
        ({"front": FrontPlan(types=("other",))}, "no type 'other'"),
        ({"recipe": "S4A0E8", "heal": HealSettings(train="router")}, "has no router to train"),
        ({"heal": HealSettings(quantize="other")}, "no type 'other'"),
        ({"recipe": "S0A4E8", "model": "olmo2"}, "it cannot: GGUF files of flex_olmo are not supported yet"),
        ({"model": "words"}, "it cannot, so use factorllm factorize, .* the tokenizer cuts text in a way that is none"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(changes, said, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "model" in changes:
        save_model(Olmo2Config(**BASE | {"pad_token_id": 0}), tmp_path / "olmo2")
        tokenizer = byte_level_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
        save_model(LlamaConfig(**BASE), tmp_path / "words", tokenizer)
    plan.model_copy(update=changes).write("plan.yaml")
    with pytest.raises(FactorLLMError, match=said):
        make_planned("plan.yaml", "made")
    assert not Path("made").exists()
    with pytest.raises(FactorLLMError, match=said):
        make_planned("plan.yaml")
    assert not Path("checkpoint").exists()


def test_without_llamacpp_that_nothing_is_timed_is_said(dense, plan, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    console = Console(record=True, quiet=False, width=200)
    chosen = choose_plan(str(dense), Wish(), str(text_file), console=console)
    assert (chosen.bench, chosen.front) == (None, None)
    assert (
        "nothing will be timed: llamacpp is not installed; pip install 'factorllm[llamacpp]'" in console.export_text()
    )
    plan.model_copy(update={"bench": Plan()}).write(tmp_path / "plan.yaml")
    with pytest.raises(FactorLLMError, match=r"bench: llamacpp is not installed.*or write `bench: null` in the plan"):
        make_planned(tmp_path / "plan.yaml")


def test_a_step_that_refuses_says_where_its_options_are(plan, tmp_path):
    wanted = plan.factorize.model_copy(update={"tokens": 10**6})
    plan.model_copy(update={"factorize": wanted}).write(tmp_path / "plan.yaml")
    where = re.escape(str(tmp_path / "plan.yaml"))
    said = rf"^factorize: the text is too short: .* off --tokens; options of factorize stand in {where}, to be changed"
    with pytest.raises(FactorLLMError, match=said):
        make_planned(tmp_path / "plan.yaml")


def test_where_healing_is_taken_out_of_a_plan_and_put_in_again(tmp_path, monkeypatch):
    """The student is in the place of the healed one then, and the other way round."""
    save_model(LlamaConfig(**BASE), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("words")
    plan = MakePlan(model=str(tmp_path / "dense"), text=str(tmp_path / "text.txt"), **PLAN)

    def writing(said, place):
        def run(work):
            folder = place(work)
            folder.mkdir(exist_ok=True)
            (folder / "what").write_text(said)

        return run

    monkeypatch.setattr(Work, "_factorize", writing("converted", lambda work: work._converted))
    monkeypatch.setattr(Work, "_heal", writing("healed", lambda work: work.at.checkpoint))
    exported = []
    monkeypatch.setattr(Work, "_export", lambda work: exported.append((work.at.checkpoint / "what").read_text()))
    for name in ("_evaluate", "_report", "_card"):
        monkeypatch.setattr(Work, name, lambda work: None)
    (tmp_path / "steps").mkdir()
    for heal in (plan.heal, None, plan.heal):
        _run(Work(plan.model_copy(update={"heal": heal}), tmp_path, Console(quiet=True)))
    assert exported == ["healed", "converted", "healed"]


@pytest.mark.parametrize("name", ["Modelfile", "checkpoint/config.json"])
def test_a_step_of_which_a_file_is_gone_is_done_again(name, made, tmp_path):
    out = tmp_path / "made"
    shutil.copytree(made.out, out)
    (out / name).unlink()
    make_planned(out / "plan.yaml")
    assert (out / name).read_bytes() == (made.out / name).read_bytes()
    assert model_bytes(out) == model_bytes(made.out)


def test_the_same_plan_elsewhere_gives_the_same_model(made, tmp_path):
    again = make_planned(made.out / "plan.yaml", tmp_path / "made")
    assert model_bytes(again.out) == model_bytes(made.out)


def test_a_wish_is_written_down_before_the_work(dense, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", run_and_timed_by(linear))
    monkeypatch.setattr("factorllm.making.run._run", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        make(str(dense), tmp_path / "made", text=str(text_file), effort="quick")
    written = read_plan(tmp_path / "made" / "plan.yaml")
    assert written.model == str(dense)
    assert written.factorize.tokens < 24_576  # the text has no more
    with pytest.raises(FactorLLMError, match="written for another wish"):
        make(str(dense), tmp_path / "made", text=str(text_file), effort="best")


def test_a_plan_from_elsewhere_is_not_taken_for_a_wish(made):
    with pytest.raises(FactorLLMError, match="was written elsewhere, and not for this wish; edit it and run"):
        make("another-model", made.out, text="another.txt", file_type="q4_0")  # was: made already, by the same plan


def test_with_a_smaller_vocabulary_the_student_is_made_from_the_trimmed_model(dense, plan, tmp_path):
    plan.model_copy(update={"vocabulary": 280, "heal": None}).write(tmp_path / "plan.yaml")
    made = make_planned(tmp_path / "plan.yaml", tmp_path / "made")
    assert open_model(str(made.out / "trimmed")).config.vocab_size == 280
    assert AutoConfig.from_pretrained(made.out / "checkpoint").vocab_size == 280
    assert made.numbers[0] == (ANY, "kept of the likeliest next tokens")  # of the trimmed model's, whose tokens it has
    assert f"factorllm eval {made.out / 'checkpoint'} --against {made.out / 'trimmed'}" in made.commands
    assert "from the dense model `trimmed (dense with fewer tokens)`" in (made.out / "checkpoint/README.md").read_text()
    assert {"trim", "factorize"} <= json.loads((made.out / "steps" / "done.json").read_text()).keys()


@pytest.mark.parametrize(
    ("vocabulary", "text", "said"),
    [(280, False, "counted in a text"), (10_000, True, "tokens, so none is left out")],
)
def test_a_vocabulary_that_cannot_be_trimmed_is_refused_before_anything(
    vocabulary, text, said, dense, text_file, tmp_path
):
    with pytest.raises(FactorLLMError, match=said):
        make(str(dense), tmp_path / "made", text=str(text_file) if text else None, vocabulary=vocabulary)
    assert not (tmp_path / "made").exists()


def test_where_fewer_tokens_are_fast_enough_no_neuron_is_left_out(dense, text_file, tmp_path, monkeypatch):
    head_and_layers = timed_by(lambda said: dict.fromkeys(("decode", "prefill"), 5 + said["block_count"]))
    monkeypatch.setattr(forecasting, "measure_speed", head_and_layers)
    with pytest.raises(FactorLLMError, match=r"with 280 tokens alone .* times as fast, so no neuron .*factorllm trim"):
        make(str(dense), tmp_path / "made", wish=Wish(speed=1.01), text=str(text_file), vocabulary=280)


def test_what_is_timed_fits_into_a_short_context(dense, text_file, monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", run_and_timed_by(linear))
    chosen = choose_plan(str(dense), Wish(), str(text_file))
    for timed in (chosen.bench, chosen.front.speed_plan()):
        assert max(*timed.prompts, timed.context + timed.steps) <= 256


def test_without_a_text_it_is_sampled_first(dense, tmp_path):
    few = Settings(tokens=512, held_out_tokens=64, length=64, baseline=False)
    sampled = SampleStep(tokens=1024)
    MakePlan(model=str(dense), recipe="S2A2E8", sample=sampled, factorize=few).write(tmp_path / "plan.yaml")
    made = make_planned(tmp_path / "plan.yaml", tmp_path / "made")
    assert (made.out / "steps" / "text.jsonl").is_file()


def test_a_time_that_is_too_short_is_refused_before_anything(dense, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(forecasting, "measure_speed", run_and_timed_by(linear))
    with pytest.raises(FactorLLMError, match="is too short: converting alone"):
        make(str(dense), tmp_path / "made", wish=Wish(time=1e-6), text=str(text_file))
    assert not (tmp_path / "made").exists()


def test_a_folder_of_the_users_is_left_alone(dense, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FactorLLMError, match=r"holds no plan\.yaml"):
        make(str(dense), tmp_path, text=str(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("recipe: S2A2E8", "model: Field required"),
        ("model: m\nrecipe: S2A2E8\nspeeed: 2", "speeed"),
        ("model: m\nrecipe: S2A2E8\nheal: {tokens: -1}", r"heal\.tokens"),
        ("model: m\nrecipe: S2A2E8", "there is neither a text nor how to sample one"),
        ("- a list", "holds no keys"),
        ("model: [", "plan.yaml"),
    ],
)
def test_a_plan_that_cannot_be_read_says_where(content, said, tmp_path):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(FactorLLMError, match=said):
        make_planned(tmp_path / "plan.yaml")


def test_a_plan_says_every_number(plan, tmp_path):
    plan.write(tmp_path / "plan.yaml")
    said = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert said["factorize"].keys() == Settings.model_fields.keys()
    assert said["heal"].keys() == HealSettings.model_fields.keys()
    assert read_plan(tmp_path / "plan.yaml") == plan


@pytest.mark.engine
def test_an_openai_client_talks_to_what_was_made(made):
    pytest.importorskip("xllamacpp")
    with served(str(made.out), "--context", "64") as (client, _):
        reply = client.chat.completions.create(model="made", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert reply.choices[0].message.role == "assistant"


@pytest.mark.parametrize("read", [read_provenance, lambda folder: open_model(str(folder))])
def test_what_wants_one_model_is_told_where_it_is(read, made):
    with pytest.raises(FactorLLMError, match=r"what `factorllm make` wrote; the checkpoint in it is .*/checkpoint$"):
        read(made.out)


def test_what_was_made_last_is_used_whatever_the_folder_is_called(made, tmp_path):
    """`make` by another plan leaves the file of the one before."""
    moved = Path(shutil.copytree(made.out, tmp_path / "moved"))
    (moved / "moved-f16.gguf").write_bytes(b"of an older plan")
    assert as_gguf(str(moved), "f16", tmp_path, print) == moved / "made-q8_0.gguf"


def test_a_file_in_a_folder_with_brackets_is_found_and_no_other(tmp_path):
    folder = tmp_path / "v[1]"
    folder.mkdir()
    for name in ("v1-q8_0.gguf", "v[1]-q4_0.gguf"):
        (folder / name).touch()
    assert as_gguf(str(folder), "f16", tmp_path, print) == folder / "v[1]-q4_0.gguf"


# Ollama's grammar (parser/parser.go): a line a command, its arguments plain, in quotes, or in three quotes over lines.
COMMAND = re.compile(r'(FROM|TEMPLATE|SYSTEM|PARAMETER \w+)\s+("""(?:.|\n)*?"""|"(?:[^"\\]|\\.)*"|[^\s"]\S*)\n|#.*\n')
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def parsed(text: str) -> dict[str, list[str]]:
    found, place = {}, 0
    while place < len(text):
        match = COMMAND.match(text, place)
        assert match, text[place : place + 80]
        if match[1]:
            found.setdefault(match[1], []).append(match[2].strip('"'))
        place = match.end()
    return found


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("m.content", "m.content[0].text")])
def test_ollama_is_given_file_template_and_stops(template, dense):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    said = parsed(modelfile("made-q8_0.gguf", tokenizer))
    assert said["FROM"] == ["./made-q8_0.gguf"]
    assert said["TEMPLATE"] == [
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    ]
    assert said["PARAMETER stop"] == [tokenizer.eos_token, "<|im_end|>"]


@pytest.mark.parametrize("template", [None, LLAMA2, "{{ raise_exception('no system') }}"])
def test_a_template_that_is_no_sequence_of_turns_is_left_to_ollama(template, dense):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = template
    said = parsed(modelfile("made-q8_0.gguf", tokenizer))
    assert "TEMPLATE" not in said
    assert said["FROM"] == ["./made-q8_0.gguf"]


@pytest.mark.engine
def test_a_conversation_in_the_terminal_with_both_models(made, dense):
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-m", "factorllm", "chat", str(made.out), "--against", str(dense), "--context", "200"]
    said = subprocess.run(command, input="hi\nand now?\n\n", capture_output=True, text=True, timeout=200, check=True)
    assert said.stdout.count("[student]") == said.stdout.count("[dense]") == 2


@pytest.mark.engine
@pytest.mark.parametrize(("context", "instead"), [(64, "conversation, or give more --context"), (4096, "conversation")])
def test_more_context_is_advised_where_the_model_has_it(context, instead, dense, tmp_path):
    pytest.importorskip("xllamacpp")
    export(str(dense), tmp_path / "dense.gguf", "f32")
    conversation = Chat(tmp_path / "dense.gguf", ServeSettings(context=context))
    with pytest.raises(FactorLLMError, match=rf"^llama\.cpp refused: .*; begin a new {instead}$"):
        list(conversation.ask("why? " * 2000))


def test_a_conversation_without_llamacpp_is_refused_before_files_are_written(made, monkeypatch, capsys):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["factorllm", "chat", str(made.out / "checkpoint")])
    with pytest.raises(SystemExit):
        main()
    error = "error: llama.cpp is not installed; pip install 'factorllm[llamacpp]'\n"
    assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL"], "say where to write with -o"),
        (["MODEL", "-o", "OUT", "--effort", "heroic"], "no effort 'heroic'; efforts: quick, standard, best"),
        (["plan.yaml", "--speed", "2"], "edit it there"),
        (["plan.yaml", "--type", "q8_0"], "so --type would be left out"),
        (["plan.yaml", "--effort", "best"], "so --effort would be left out"),
        (["MODEL", "-o", "OUT", "--time", "soon"], "--time: Value error, 'soon' is not understood"),
        (["MODEL", "-o", "OUT", "--speed", "0.5"], "--speed: Input should be greater than 1"),
        (["missing.yaml"], "missing.yaml cannot be used"),
    ],
)
def test_what_make_cannot_take_is_one_line(arguments, said, dense, tmp_path, monkeypatch, capsys):
    places = {"MODEL": str(dense), "OUT": str(tmp_path / "out")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["factorllm", "make", *(places.get(one, one) for one in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_an_effort_that_there_is_not_is_refused(dense_folder, text_file, tmp_path):
    with pytest.raises(FactorLLMError, match="no effort 'much'; efforts: quick, standard, best"):
        make(str(dense_folder), tmp_path / "out", text=str(text_file), effort="much")
    assert not (tmp_path / "out").exists()
