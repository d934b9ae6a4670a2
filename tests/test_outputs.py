"""What is written where: nothing of the user's is lost, no finished work is, and a refused try blocks nothing."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import forked
import pytest
from conftest import CHAT_TEMPLATE, CONFIGS, save_dense
from test_factorize import contents
from test_refusals import cli  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from factorllm import FactorLLMError, factorize
from factorllm.dense.model import ModelSource
from factorllm.exporting import export_gguf
from factorllm.healing.run import heal
from factorllm.healing.settings import HealSettings
from factorllm.runs import workspace as module
from factorllm.runs.settings import Settings
from factorllm.student.read import load_student
from factorllm.text.sample import sample

SETTINGS = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)
HEALING = HealSettings(tokens=1024, validation_tokens=256, evaluations=1, precision="float32")
SAMPLING = Settings(tokens=512, length=32)


@pytest.fixture(scope="module")
def made(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "student"
    factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=SETTINGS)
    return out


@pytest.fixture
def own(made, tmp_path):
    """A finished checkpoint, a fresh copy for each test."""
    return shutil.copytree(made, tmp_path / "student")


@pytest.fixture
def run(dense_folder, text_file):
    def call(out, *, model=dense_folder, text=text_file, recipe="S2A2E8", settings=SETTINGS, **options):
        return factorize(str(model), out, recipe, text=str(text), settings=settings, **options)

    return call


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is the user's stays.


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_factorllm_did_not_make_is_never_replaced(run, tmp_path, overwrite):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FactorLLMError, match="is not a checkpoint that factorllm made, so it is never replaced"):
        run(out, overwrite=overwrite)
    assert tree(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("damage", ["[]", "{", '{"format": 1}'])
def test_a_file_of_our_name_makes_no_checkpoint_of_ours(run, tmp_path, damage):
    out = tmp_path / "out"
    out.mkdir()
    (out / "factorllm.json").write_text(damage)
    with pytest.raises(FactorLLMError, match="so it is never replaced"):
        run(out, overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "report/notes.txt", "models/a.bin", "adapter_model.safetensors"])
def test_a_file_of_the_users_in_a_checkpoint_is_not_lost(run, own, name):
    (own / name).parent.mkdir(exist_ok=True)
    (own / name).write_text("mine")
    before = tree(own)
    with pytest.raises(FactorLLMError, match=rf"holds {name.partition('/a')[0]}, which factorllm did not put there"):
        run(own, overwrite=True)
    assert tree(own) == before


@pytest.mark.parametrize("through", ["itself", "its folder", "a link to it", "a linked file of it", "the text"])
def test_an_input_is_never_written_over(run, tmp_path, through, dense_folder, text_file):
    holder = tmp_path / "holder"
    shutil.copytree(dense_folder, holder / "model")
    model, out, text = holder / "model", holder / "model", text_file
    if through == "its folder":
        out = holder
    elif through == "a link to it":
        out = tmp_path / "link"
        out.symlink_to(holder)
    elif through == "a linked file of it":  # as the hub's cache holds them
        model = tmp_path / "snapshot"
        model.mkdir()
        for path in (holder / "model").iterdir():
            (model / path.name).symlink_to(path)
    elif through == "the text":
        model, out, text = dense_folder, holder, holder / "words.txt"
        shutil.copy(text_file, text)
    before = tree(holder)
    with pytest.raises(FactorLLMError, match=r"is or holds .*, which this command reads"):
        run(out, model=model, text=text, overwrite=True)
    assert tree(holder) == before
    assert not (tmp_path / "holder.partial").exists()


def test_a_student_is_not_healed_onto_itself_or_its_teacher(own, dense_folder, text_file):
    for out in (own, own.parent, dense_folder):
        with pytest.raises(FactorLLMError, match="which this command reads"):
            heal(own, str(dense_folder), out, text=str(text_file), settings=HEALING, overwrite=True)


def test_a_model_is_not_exported_onto_itself(tmp_path, dense_folder):
    shutil.copytree(dense_folder, tmp_path / "dense")
    with pytest.raises(FactorLLMError, match="which this command reads"):
        export_gguf(str(tmp_path / "dense"), tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FactorLLMError, match="is a folder, and -o is a file to write"):
        export_gguf(str(tmp_path / "dense"), tmp_path / "empty")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(file)
    for model, tokenizer in ((str(file), None), (str(tmp_path / "dense"), file)):
        with pytest.raises(FactorLLMError, match=r"model\.gguf, which this command reads"):
            export_gguf(model, tmp_path / "link.gguf", tokenizer=tokenizer, overwrite=True)


def test_only_sampled_text_is_replaced(tmp_path, dense_folder):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "mine"}\n')
    for overwrite in (False, True):
        with pytest.raises(FactorLLMError, match="is not text that factorllm sampled, so it is never replaced"):
            sample(str(dense_folder), mine, settings=SAMPLING, overwrite=overwrite)
    assert mine.read_text() == '{"text": "mine"}\n'


def test_eval_report_and_bench_replace_their_own_files_only(own, cli, tmp_path):  # noqa: F811
    before = tree(own)
    code, error = cli("eval", own, "-o", own / "config.json")
    assert code == 2
    assert "is not what factorllm eval wrote" in error or "which this command reads" in error
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("my page")
    (site / "speed.png").write_text("my picture")
    for command in (("report", own, "-o", site), ("bench", own, "--against", own, "-o", site)):
        code, error = cli(*command)
        assert code == 2
        assert "exists already and was not made by factorllm" in error
    assert tree(own) == before
    assert tree(site) == {"index.html": b"my page", "speed.png": b"my picture"}
    for _ in range(2):
        assert cli("report", own) == (0, "")
    assert {path.name for path in (own / "report").iterdir()} >= {"index.html", "quality.png"}


# Finished work is not lost.


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_is_there_is_filled_where_it_stands(run, made, tmp_path):
    """It may be a mount point, or the folder that a shell is in; then it cannot be replaced by another."""
    out = tmp_path / "student"
    out.mkdir()
    before = out.stat().st_ino
    run(out)
    assert out.stat().st_ino == before
    assert contents(out) == contents(made)
    assert names(tmp_path) == {"student"}


def test_a_link_to_a_folder_is_filled_and_stays_a_link(run, made, tmp_path):
    (tmp_path / "big").mkdir()
    for name, target in (("link", tmp_path / "big"), ("dangling", tmp_path / "new")):
        (tmp_path / name).symlink_to(target)
        run(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert contents(target).keys() == contents(made).keys()


FILL = """
import sys
from pathlib import Path

from factorllm import Settings, factorize

for name in ("tmpfs", "bound"):
    few = Settings(tokens=2048, held_out_tokens=512, baseline=False)
    factorize(sys.argv[1], Path(name), "S2A2E8", text=sys.argv[2], settings=few)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0, reason="nothing can be mounted"
)
def test_a_mount_point_is_filled(dense_folder, text_file, tmp_path):
    for name in ("tmpfs", "bound", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "make.py").write_text(FILL)
    mounts = "mount -t tmpfs none tmpfs && mount --bind other bound"
    script = f"{mounts} && {sys.executable} make.py {dense_folder} {text_file} && cp -r tmpfs bound kept"
    (tmp_path / "kept").mkdir()
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, check=True, capture_output=True)
    for name in ("tmpfs", "bound"):
        kept = tmp_path / "kept" / name
        assert AutoModelForCausalLM.from_pretrained(kept).config.model_type == "granitemoeshared"
        assert not (kept / ".partial").exists()
        assert not (tmp_path / f"{name}.partial").exists()


@pytest.mark.parametrize("moved", [0, 2, 5])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_publishing_never_leaves_what_looks_whole(run, made, own, tmp_path, monkeypatch, moved, overwrite):
    out = own if overwrite else tmp_path / "student-2"
    out.mkdir(exist_ok=True)
    replace, done = type(out).replace, []

    def killed(path, target):
        if path.parent.name == "student" and path.parent.parent.name == ".partial" and target.parent == out:
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(path)
        return replace(path, target)

    other = SETTINGS.model_copy(update={"seed": 3})
    with monkeypatch.context() as patch:
        patch.setattr(type(out), "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out, settings=other, overwrite=overwrite)
    assert not (out / "config.json").exists()
    assert run(out, settings=other).done_already
    run(tmp_path / "whole" / out.name, settings=other)
    assert contents(out) == contents(tmp_path / "whole" / out.name)


def test_a_kill_just_after_publishing_leaves_nothing(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert names(tmp_path) == {"out", "out.partial"}
    assert run(tmp_path / "out").done_already
    assert names(tmp_path) == {"out"}


def test_overwrite_replaces_only_at_the_end(run, own, monkeypatch):
    before = contents(own)
    with monkeypatch.context() as patch:
        patch.setattr("factorllm.convert.factorize.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(own, recipe="S1A1E4", overwrite=True)
    assert {name: data for name, data in tree(own).items() if name in before} == before
    (own / "README.md").write_text("the old card")
    run(own, recipe="S1A1E4", overwrite=True)
    assert "S1A1E4" in (own / "README.md").read_text()
    assert not (own / ".partial").exists()
    AutoModelForCausalLM.from_pretrained(own)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, text_file):
    (tmp_path / "file").write_text("mine")
    for out, says in (
        (tmp_path / "file", "is a file, and -o is a folder to write"),
        (tmp_path / "file" / "out", "is a file; choose another -o"),
        (tmp_path / ("x" * 250), r"the name of .* is too long: 247 bytes are left for it"),
        (tmp_path / "sub" / ("ä" * 130), "is too long"),
        ("/proc/out", "cannot be used .*; choose another -o"),
        ("", "the output's path is empty"),
        ("/", "which this command reads"),
    ):
        with pytest.raises(FactorLLMError, match=says):
            run(out)
    assert names(tmp_path) == {"file"}


def test_what_is_needed_at_the_end_is_looked_at_before_the_work(run, tmp_path, monkeypatch):
    save_dense(CONFIGS["gqa-tied"], tmp_path / "dense")
    (tmp_path / "dense" / "generation_config.json").write_text('{"num_return_sequences": 3}')
    monkeypatch.setattr("factorllm.convert.factorize._convert_layers", None)
    with pytest.raises(FactorLLMError, match="num_return_sequences"):
        run(tmp_path / "out", model=tmp_path / "dense")


def test_healing_looks_at_the_end_before_the_work(own, dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("factorllm.healing.run._ask_teacher", None)
    options = {"text": str(text_file), "settings": HEALING}
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(FactorLLMError, match=r"no space left .* are needed"):
            heal(own, str(dense_folder), tmp_path / "healed", **options)
    with monkeypatch.context() as patch:
        patch.setattr("factorllm.runs.memory.available_memory", lambda: 0)
        patch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=10_000))
        with pytest.raises(FactorLLMError, match=r"not enough memory: .* moments take .* use --train lora"):
            heal(own, str(dense_folder), tmp_path / "healed", **options)
    (own / "generation_config.json").write_text('{"num_return_sequences": 3}')
    with pytest.raises(FactorLLMError, match=r"generation_config\.json cannot be used"):
        heal(own, str(dense_folder), tmp_path / "healed", **options)
    assert names(tmp_path) == {"student"}


# A refused try blocks nothing.


def test_a_refused_try_leaves_nothing_behind(run, own, dense_folder, text_file, tmp_path):
    (tmp_path / "typo.txt").write_text("too short")
    for text in (tmp_path / "wrods.txt", tmp_path / "typo.txt"):
        with pytest.raises(FactorLLMError):
            run(tmp_path / "out", text=text)
        with pytest.raises(FactorLLMError):
            heal(own, str(dense_folder), tmp_path / "healed", text=str(text), settings=HEALING)
    with pytest.raises(FactorLLMError, match="too short"):
        run(tmp_path / "out", settings=SETTINGS.model_copy(update={"tokens": 10**9}))
    assert names(tmp_path) == {"student", "typo.txt"}
    run(tmp_path / "out")


def test_a_run_that_was_killed_while_it_read_its_text_blocks_nothing(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.Workspace, "__exit__", lambda self, *_: self._lock.close())
        with pytest.raises(FactorLLMError):
            run(tmp_path / "out", text=tmp_path / "wrods.txt")
    assert (tmp_path / "out.partial" / "job.json").exists()
    run(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_text_is_known_by_its_content(run, made, text_file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    text = shutil.copy(text_file, tmp_path / "elsewhere" / text_file.name)
    shutil.copytree(made, tmp_path / "student")
    assert run(tmp_path / "student", text=text).done_already
    text.write_text(text.read_text() + "more")
    with pytest.raises(FactorLLMError, match=r"exists already, made with other text \(.*add --overwrite"):
        run(tmp_path / "student", text=text)


def test_a_text_is_known_by_how_it_is_read(run, made, text_file, tmp_path):
    """The same bytes are other documents as lines of JSON than as paragraphs."""
    text = shutil.copy(text_file, tmp_path / "text.JSONL")
    shutil.copytree(made, tmp_path / "student")
    with pytest.raises(FactorLLMError, match=r"exists already, made with other text \("):
        run(tmp_path / "student", text=text)
    packed = tmp_path / "text.txt"
    packed.write_bytes(text_file.read_bytes())
    assert run(tmp_path / "student", text=packed).done_already


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_model_is_known_by_what_stands_beside_its_weights(name, run, made, own, dense_folder, text_file, tmp_path):
    """Tokens are cut by it, and it is written beside the student; a card decides nothing."""
    model = shutil.copytree(dense_folder, tmp_path / "dense")
    healing = {"text": str(text_file), "settings": HEALING}
    heal(made, str(model), tmp_path / "healed", **healing)
    sample(str(model), tmp_path / "sampled.jsonl", settings=SAMPLING)
    for folder in (model, own):
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert run(own, model=model).done_already
    assert heal(own, str(model), tmp_path / "healed", **healing).seconds is None
    before = tree(tmp_path / "healed"), tree(own)
    with (model / name).open("a") as file:
        file.write("\n ")
    for again in (
        lambda: run(own, model=model),
        lambda: heal(own, str(model), tmp_path / "healed", **healing),
        lambda: sample(str(model), tmp_path / "sampled.jsonl", settings=SAMPLING),
    ):
        with pytest.raises(FactorLLMError, match="made with other files beside the "):
            again()
    shutil.copy(dense_folder / name, model)
    with (own / name).open("a") as file:
        file.write("\n ")
    with pytest.raises(FactorLLMError, match="made with other student "):
        heal(own, str(model), tmp_path / "healed", **healing)
    shutil.copy(made / name, own)
    assert (tree(tmp_path / "healed"), tree(own)) == before


def test_a_student_that_runs_more_experts_than_it_has_is_refused(own):
    config = json.loads((own / "config.json").read_text())
    most = config["num_local_experts"]
    for many, refused in ((most, False), (most + 1, True)):
        (own / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": many}))
        says = f"config.json says that {many} of {most} experts run for a token; make the"
        with pytest.raises(FactorLLMError, match=says) if refused else nullcontext():
            load_student(own)


# What is done is not done again.


def test_what_is_done_is_shown_again(made, dense_folder, text_file, cli, capsys, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ("factorize", dense_folder, "-o", out, "--text", text_file, "--tokens", 2048, "--held-out-tokens", 512)
    assert cli(*command)[0] == 0
    before = tree(out)
    first = call(command, capsys)
    assert "done already" in first
    assert tree(out) == before
    for row in ("dense", "student", "static prune"):
        assert row in first
    code, error = cli(*command, "--tune", 2)
    assert code == 2
    assert "made with other settings.tune (0, now 2); choose another output folder, or add --overwrite" in error
    (out / "config.json").unlink()
    assert "parts of it are gone" in cli(*command)[1]


def call(command, capsys) -> str:
    capsys.readouterr()
    done = forked.ended(forked.command(*command))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_healing_and_a_sampling_that_are_done_are_not_repeated(own, dense_folder, text_file, tmp_path, monkeypatch):
    options = {"text": str(text_file), "settings": HEALING}
    first = heal(own, str(dense_folder), tmp_path / "healed", **options)
    text = sample(str(dense_folder), tmp_path / "sampled.jsonl", settings=SAMPLING)
    records = [json.loads(line) for line in text.read_text().splitlines()]
    assert [set(record) for record in records[:2]] == [{"source", "text", "job"}, {"source", "text"}]
    before = tree(tmp_path)
    again = heal(own, str(dense_folder), tmp_path / "healed", **options)
    assert (again.results, again.held_out_tokens) == (first.results, first.held_out_tokens)
    sample(str(dense_folder), text, settings=SAMPLING)
    assert tree(tmp_path) == before
    with pytest.raises(FactorLLMError, match=r"other settings\.epochs \(1, now 2\)"):
        heal(
            own,
            str(dense_folder),
            tmp_path / "healed",
            text=str(text_file),
            settings=HEALING.model_copy(update={"epochs": 2}),
        )
    with pytest.raises(FactorLLMError, match="other temperature"):
        sample(str(dense_folder), text, temperature=0.5, settings=SAMPLING)
    sample(str(dense_folder), text, temperature=0.5, settings=SAMPLING, overwrite=True)


# Files are as the user's others.


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(run, own, dense_folder, text_file, tmp_path, mask):
    before = os.umask(mask)
    try:
        run(tmp_path / "out")
        heal(own, str(dense_folder), tmp_path / "healed", text=str(text_file), settings=HEALING)
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "healed"):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
        assert modes == {0o666 & ~mask}


def test_healing_copies_what_belongs_to_a_checkpoint(own, dense_folder, text_file, tmp_path):
    """Not what the user put there: scores, or a GGUF file, are of the student before."""
    (own / "scores.json").write_text("{}")
    (own / "model.gguf").write_bytes(b"GGUF")
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    heal(own, str(dense_folder), tmp_path / "healed", text=str(text_file), settings=HEALING)
    assert names(tmp_path / "healed") >= {"tokenizer.json", "config.json", "chat_template.jinja"}
    assert not names(tmp_path / "healed") & {"scores.json", "model.gguf"}
    templates = AutoTokenizer.from_pretrained(tmp_path / "healed").chat_template
    assert templates == {"default": CHAT_TEMPLATE, "tool_use": "{{ messages }}"}
    heal(own, str(dense_folder), tmp_path / "healed", text=str(text_file), settings=HEALING, overwrite=True)


# Interruptions.


def hang(words: list[str]) -> None:
    """A command that waits where the model has been opened."""
    ModelSource._check = lambda self: (print("here", flush=True), time.sleep(60))
    forked.run_main(words)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("factorize {model} -o {out} --text {text} --tokens 50000", "the same command goes on where it stopped"),
        ("export {model} -o {out}/model.gguf", "nothing was written"),
    ],
)
def test_an_interruption_says_what_becomes_of_the_work(command, says, dense_folder, text_file, tmp_path):
    words = command.format(model=dense_folder, out=tmp_path / "out", text=text_file).split()
    process = forked.Forked(hang, words)
    while process.said()[0] != "here\n":
        assert process.poll() is None, process.said()
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    done = forked.ended(process)
    assert (done.returncode, done.stderr) == (130, f"interrupted; {says}\n")
    assert names(tmp_path) == set()
