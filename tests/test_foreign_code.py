"""No Python of a model's folder, nor of the folder that a command is given in, is ever run, whoever says yes."""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from inspect import unwrap
from pathlib import Path

import pytest
from conftest import words
from forked import free_port
from fuzzing import DENSE, digest, run, tokenizer_with_merges
from rich.console import Console
from test_bench import TINY
from transformers import PreTrainedConfig

import factorllm
import factorllm.engines.vllm
import factorllm.serving.serve
from factorllm import FactorLLMError
from factorllm.dense import open_model
from factorllm.dense.pretrained import load_config
from factorllm.engines import EngineProcess, Options
from factorllm.measure.speed.run import run_bench
from factorllm.serving.serve import vllm_arguments
from factorllm.serving.settings import ServeSettings
from factorllm.student.read import load_student

AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizerFast"],
    "AutoProcessor": "processing_x.XProcessor",
    "AutoFeatureExtractor": "processing_x.XExtractor",
    "AutoImageProcessor": "processing_x.XImages",
}
CONFIGS_WITH_A_MAP = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CODE = (
    *("modeling_x.py", "configuration_x.py", "tokenization_x.py", "processing_x.py", "custom_generate/generate.py"),
    *("setup.py", "sitecustomize.py", "usercustomize.py", "__init__.py", "__main__.py", "conftest.py"),
    *("json.py", "torch.py", "numpy.py", "transformers.py", "tokenizers.py", "safetensors.py", "gguf.py", "typing.py"),
    *("xllamacpp.py", "vllm.py", "factorllm/__init__.py", "factorllm/engines/worker.py", "random.py", "tempfile.py"),
)
PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "model.pt", "rng_state.pth")
FEW = ("--tokens", 1024, "--device", "cpu")
FEW_IN_ALL = (*FEW, "--held-out-tokens", 512)


class Bomb:
    """Writes to a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.marker, "a pickle was loaded")


class Traps:
    """Code that leaves a marker when it is run, put into folders."""

    def __init__(self, marker: Path):
        self.marker = marker

    def lay_code(self, folder: Path) -> None:
        for name in CODE:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"open({str(self.marker)!r}, 'a').write({name!r} + chr(10))\n")

    def lay(self, folder: Path, model_type: str | None = None) -> None:
        """Code, pickles, and configs that ask for the code."""
        self.lay_code(folder)
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Bomb(self.marker)))
        for name in CONFIGS_WITH_A_MAP:
            path = folder / name
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | {"auto_map": AUTO_MAP, "trust_remote_code": True}))
        if model_type:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))

    @property
    def sprung(self) -> str:
        return self.marker.read_text() if self.marker.exists() else ""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(words(40, seed) for seed in range(140)))
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory, text) -> Path:
    """A dense model and students of it, without traps."""
    from conftest import save_dense

    root = tmp_path_factory.mktemp("clean")
    save_dense(DENSE["llama"], root / "dense")
    tokenizer_with_merges().save_pretrained(root / "dense")
    return root


@pytest.fixture
def traps(tmp_path, monkeypatch) -> Iterator[Traps]:
    """Every question is answered with yes, in a working directory full of code; the marker never appears."""
    traps = Traps(tmp_path / "marker")
    here = tmp_path / "here"
    traps.lay_code(here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    asked: list[object] = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield traps
    assert not traps.sprung
    assert not asked, "a command asked whether to run foreign code"


@pytest.fixture
def dense(clean, tmp_path, traps) -> Path:
    folder = Path(shutil.copytree(clean / "dense", tmp_path / "dense"))
    traps.lay(folder)
    return folder


@pytest.fixture
def student(dense, tmp_path, traps, text) -> Path:
    """A student of the dense model with traps, with traps of its own."""
    made("factorize", dense, "-o", tmp_path / "student", "--text", text, "--no-baseline", *FEW_IN_ALL)
    traps.lay(tmp_path / "student")
    return tmp_path / "student"


def made(*arguments: object) -> str:
    """What a command printed that must have worked."""
    ended = run(*arguments)
    assert ended.code == 0, ended.err[-300:]
    return ended.out


def declared_code(folder: Path) -> list[str]:
    """Files of a checkpoint that are code or a pickle, or name some."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [path for path in files if path.suffix in (".py", ".bin", ".pt", ".pth")]
    found += [path for path in files if path.suffix == ".json" and "auto_map" in path.read_text()]
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.mark.parametrize("recipe", ["S2A2E8", "S4A0E8"])
def test_factorize(dense, tmp_path, text, recipe):
    before = digest(dense)
    made("factorize", dense, "-o", tmp_path / "out", "--recipe", recipe, "--text", text, "--no-baseline", *FEW_IN_ALL)
    assert digest(dense) == before
    assert declared_code(tmp_path / "out") == []


def test_a_model_of_a_kind_that_only_its_own_code_knows_is_refused(dense, traps, tmp_path, text):
    traps.lay(dense, model_type="x")
    commands = (
        ("factorize", dense, "-o", tmp_path / "out", "--text", text, *FEW_IN_ALL),
        ("sample", dense, "-o", tmp_path / "out.jsonl", *FEW),
        ("export", dense, "-o", tmp_path / "out.gguf"),
        ("serve", dense, "--engine", "llamacpp"),
        ("bench", dense, "--against", dense, "--engine", "transformers"),
    )
    for command in commands:
        ended = run(*command)
        assert ended.code == 2
        assert "error: " in ended.err
    with pytest.raises(FactorLLMError), EngineProcess("transformers", dense, Options(context=64)):
        pass


def test_pickles_are_not_read_instead_of_missing_weights(dense, tmp_path, text):
    (dense / "model.safetensors").unlink()
    ended = run("factorize", dense, "-o", tmp_path / "out", "--text", text, *FEW_IN_ALL)
    assert ended.code == 2
    assert "pickled .bin files are never loaded" in ended.err


def test_sample(dense, tmp_path):
    made("sample", dense, "-o", tmp_path / "out.jsonl", "--tokens", 64, "--device", "cpu")
    made("sample", dense, "-o", tmp_path / "chat.jsonl", "--tokens", 64, "--device", "cpu", "--chat")


def test_heal(student, dense, tmp_path, text):
    made("heal", student, "--teacher", dense, "-o", tmp_path / "out", "--text", text, "--precision", "float32", *FEW)
    assert (tmp_path / "out" / "config.json").exists()


def test_eval_report_and_inspect(student, dense, tmp_path, text):
    (tmp_path / "data").mkdir()
    made("eval", student, "--against", dense, "--tasks", "", "--text", text)
    made("inspect", student)
    made("inspect", student, "--prompt", "the router")
    made("report", student, "--against", dense, "-o", tmp_path / "report")


def test_a_task_that_is_scored(student, dense, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(unwrap(factorllm.measure.scores.evaluate).__kwdefaults__, "cache", tmp_path / "cache")
    question = {"query": "the router", "choices": ["a token", "an expert"], "gold": 0}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "copa.jsonl").write_text("\n".join([json.dumps(question)] * 4))
    made("eval", student, "--against", dense, "--tasks", "copa", "--data", tmp_path / "data")


def test_programs_of_a_model_are_not_run_unless_it_is_said(student, dense, traps, tmp_path, monkeypatch):
    """Whatever the model would write: the test of the problem itself leaves the marker."""
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(unwrap(factorllm.measure.scores.evaluate).__kwdefaults__, "cache", tmp_path / "cache")
    trap = f"open({str(traps.marker)!r}, 'w').write('a program was run')"
    problem = {"prompt": f"{trap}\ndef f():\n", "test": trap, "entry_point": "f"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "humaneval.jsonl").write_text(json.dumps(problem))
    ended = run("eval", student, "--against", dense, "--tasks", "humaneval", "--data", tmp_path / "data")
    assert ended.code == 2
    assert "--run-generated-code" in ended.err


def test_generation_that_the_model_wants_to_do_with_code(student, tmp_path):
    """Ways to generate that have moved out of transformers are fetched as code, by name or from the folder."""
    path = student / "generation_config.json"
    wanted = {"penalty_alpha": 0.6, "top_k": 4, "custom_generate": str(student)}
    path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
    ended = run("report", student, "-o", tmp_path / "report")
    assert ended.code in (0, 2), ended.err


def test_export(student, dense, tmp_path):
    for model in (student, dense):
        made("export", model, "-o", tmp_path / f"{model.name}.gguf", "--type", "f32")


def test_a_gguf_file_in_a_folder_of_code(dense, traps, tmp_path, text):
    folder = tmp_path / "gguf"
    traps.lay_code(folder)
    made("export", dense, "-o", folder / "model.gguf", "--type", "f32")
    for name in CONFIGS_WITH_A_MAP:
        (folder / name).write_text(json.dumps({"auto_map": AUTO_MAP, "model_type": "x"}))
    model = folder / "model.gguf"
    ended = run("factorize", model, "-o", tmp_path / "out", "--text", text, "--no-baseline", *FEW_IN_ALL)
    assert ended.code in (0, 2), ended.err


@pytest.mark.parametrize("engine", ["transformers", pytest.param("llamacpp", marks=pytest.mark.engine)])
def test_bench(engine, student, dense, tmp_path):
    plan = TINY.model_copy(update={"batches": (1,)})
    run_bench(str(student), [str(dense)], engine, "f32", plan, None, Console(quiet=True))


@pytest.mark.engine
def test_serve(student, monkeypatch):
    """Up to where it would wait for clients."""
    waited = []
    event = types.SimpleNamespace(wait=lambda: waited.append(True))
    monkeypatch.setattr("factorllm.serving.serve.threading", types.SimpleNamespace(Event=lambda: event))
    made("serve", student, "--engine", "llamacpp", "--type", "f32", "--context", 64, "--port", free_port())
    assert waited


def test_an_adapter_does_not_lead_to_another_model(student, dense, clean, traps, tmp_path):
    """transformers follows an adapter's config to its base model, and loads that one instead."""
    other = Path(shutil.copytree(clean / "dense", tmp_path / "other"))
    traps.lay(other)
    adapter = {"base_model_name_or_path": str(other), "peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    adapter["auto_mapping"] = {"base_model_class": "XForCausalLM", "parent_library": "modeling_x"}
    for folder in (student, dense):
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for command in (
        ("inspect", student, "--prompt", "the router"),
        ("export", student, "-o", tmp_path / "out.gguf", "--type", "f32"),
        ("sample", dense, "-o", tmp_path / "out.jsonl", "--tokens", 32, "--device", "cpu"),
        ("report", student, "-o", tmp_path / "report"),
    ):
        ended = run(*command)
        assert ended.code in (0, 2), ended.err
    with suppress(FactorLLMError):
        assert load_student(student).config.model_type == "granitemoeshared"


@pytest.mark.parametrize("engine", ["transformers", pytest.param("llamacpp", marks=pytest.mark.engine)])
def test_an_engine_is_not_started_with_the_code_of_the_working_directory(engine, dense, tmp_path):
    model = dense
    if engine == "llamacpp":
        model = tmp_path / "model.gguf"
        made("export", dense, "-o", model, "--type", "f32")
    with EngineProcess(engine, model, Options(context=64, decode_threads=1)) as process:
        assert len(process.generate([1, 2, 3], 2)) == 2


def test_a_command_of_the_shell(dense, traps, tmp_path, text):
    """The program itself, in a folder of code, with a pipe that says yes for ever."""
    program = Path(sys.executable).with_name("factorllm")
    if not program.exists():
        pytest.skip("factorllm is not installed as a program here")
    arguments = ["factorize", dense, "-o", tmp_path / "out", "--text", text, "--no-baseline", *FEW_IN_ALL]
    done = subprocess.run(
        [program, *map(str, arguments)],
        input="y\n" * 99,
        text=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "Do you wish to run the custom code" not in done.stdout + done.stderr


def test_vllm_is_told_not_to_run_code(clean, traps, monkeypatch):
    told: dict = {}

    class LLM:
        def __init__(self, model: str, **options):
            told.update(options)
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(get_vocab_size=lambda: 264))

    def get_config(model: str, trust_remote_code: bool) -> PreTrainedConfig:
        assert trust_remote_code is False
        return load_config(Path(model))

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM))
    monkeypatch.setitem(sys.modules, "vllm.transformers_utils.config", types.SimpleNamespace(get_config=get_config))
    factorllm.engines.vllm.Vllm(str(clean / "dense"), Options(context=64))
    assert told["trust_remote_code"] is False
    assert "hf_overrides" not in told


def test_the_server_of_vllm_is_not_told_to_run_code(clean, traps, monkeypatch):
    for gpus in (0, 1, 4):
        arguments = vllm_arguments(clean / "dense", ServeSettings(context=64), gpus)
        assert not [word for word in arguments if "trust" in word]
    calls = []
    monkeypatch.setattr("factorllm.serving.serve.installed", lambda engine: True)
    server = types.SimpleNamespace(wait=lambda: 0, terminate=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: calls.append((command, options)) or server)
    made("serve", clean / "dense", "--engine", "vllm", "--context", 64)
    (command, options), *_ = calls
    assert not [word for word in command if "trust" in str(word)]
    safe = "-P" in command or options.get("env", {}).get("PYTHONSAFEPATH")
    assert safe, "python -m would import from the working directory"


# ---------------------------------------------------------------- the source

SOURCE = Path(factorllm.__file__).parent
LOADERS = ("from_pretrained", "from_config")
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp"}
MAY_IMPORT_BY_NAME = {"__init__.py", "engines/worker.py"}  # a name of their own tables


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """File, call and the name of what is called, of every call in the product."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(SOURCE)), node, ast.unparse(node.func)


def is_safe(call: ast.Call) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
    spread = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
    return given.get("trust_remote_code") == "False" or "_SAFE" in spread


def test_every_loader_is_told_not_to_trust():
    from factorllm.dense import pretrained

    assert pretrained._SAFE == {"trust_remote_code": False}
    found = [(path, called, call) for path, call, called in calls() if called.rpartition(".")[2] in LOADERS]
    assert len(found) >= 3
    of_no_code = "GenerationConfig.from_pretrained"  # it reads JSON only
    unsafe = [(path, called) for path, called, call in found if called != of_no_code and not is_safe(call)]
    assert unsafe == []
    outside = {path for path, called, _ in found if called.endswith("from_pretrained")} - {"dense/pretrained.py"}
    assert outside == set()


def test_nothing_in_the_source_runs_or_unpickles_what_users_give():
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "yaml.load", "np.load"}
    found = [
        (path, called)
        for path, call, called in calls()
        if called in forbidden
        or called == "numpy.load"
        or (called.endswith("import_module") and path not in MAY_IMPORT_BY_NAME)
        or any(keyword.arg == "shell" for keyword in call.keywords)
    ]
    assert found == []


def test_no_module_that_unpickles_is_imported():
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.split(".")[0] in UNSAFE_MODULES]
    assert found == []
    assert "trust_remote_code=True" not in "".join(path.read_text() for path in SOURCE.rglob("*.py"))


def test_pickles_of_a_model_folder_are_not_opened(dense, text, tmp_path):
    """Not even to be looked into: a tensor file is a safetensors file, or a GGUF file."""
    source = open_model(str(dense))
    assert {path.suffix for path in source.files} == {".safetensors"}
    for name in PICKLES:
        (dense / name).unlink()
        (dense / name).mkdir()  # opening it would fail
    made("factorize", dense, "-o", tmp_path / "out", "--text", text, "--no-baseline", *FEW_IN_ALL)
