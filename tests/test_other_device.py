"""No tensor is where the others are not: every command that computes runs on an emulated device, for CI has no GPU."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, words
from safetensors.torch import load_file
from test_export import save_model

from factorllm import Settings, factorize

FEW = ("--tokens", 1024, "--held-out-tokens", 128, "--no-baseline")
SHORT = ("--tokens", 512, "--learning-rate", 1e-3)
SETTINGS = Settings(tokens=1024, held_out_tokens=128, baseline=False)


def on_other_device(*commands: tuple) -> None:
    """Run `factorllm` with each of these words, and `--device`."""
    program = Path(__file__).with_name("emulated_device.py")
    given = json.dumps([[*map(str, words), "--device", "emulated"] for words in commands])
    done = subprocess.run([sys.executable, program], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def heal_words(made: Path, out: Path, *how: object) -> tuple:
    given = (made / "student", "--teacher", made / "dense", "--text", made / "text.txt", *SHORT)
    return ("heal", *given, "-o", out, *how)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense model, a text, and a student that was made on the CPU."""
    folder = tmp_path_factory.mktemp("other-device")
    config = deepcopy(CONFIGS["gqa-tied"])
    config.max_position_embeddings = 256  # few long sequences: each operation costs, not each token
    save_model(config, folder / "dense")
    (folder / "text.txt").write_text("\n\n".join(words(40, seed) for seed in range(120)))
    factorize(folder / "dense", folder / "student", "S2A2E8", text=folder / "text.txt", settings=SETTINGS)
    return folder


@pytest.fixture(scope="module")
def there(made):
    """What the commands of `make test` made there, in one process, for starting it costs as much as a command."""
    out = made / "there"
    out.mkdir()
    on_other_device(
        ("factorize", made / "dense", "-o", out / "student", "--recipe", "S2A2E8", "--text", made / "text.txt", *FEW),
        heal_words(made, out / "healed", "--train", "mor1e", "--kinds", 2),
    )
    return out


def test_a_conversion_is_that_of_the_cpu(made, there):
    found, wanted = weights(there / "student"), weights(made / "student")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():  # sums are rounded otherwise, which a router's fit makes more of
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.01 * tensor.abs().max().item())


def test_a_student_heals_there(there):
    assert json.loads((there / "healed" / "factorllm.json").read_text())["healing"]["settings"]["train"] == "mor1e"


@pytest.mark.slow
def test_models_are_sampled_and_measured_there(made, tmp_path):
    student, against = made / "student", ("--against", made / "dense")
    on_other_device(
        ("sample", made / "dense", "-o", tmp_path / "sampled.jsonl", "--tokens", 128, "--length", 64),
        ("eval", student, *against, "--text", made / "text.txt", "--tasks", "", "-o", tmp_path / "scores.json"),
        ("report", student, *against, "-o", tmp_path / "report"),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"sampled.jsonl", "scores.json", "report"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["S0A4E8N3", "S6A0E8", "cmoe", "moefication", "factorllm-paper", "read-me:K2"])
def test_all_kinds_of_students_are_made_there(recipe, made, tmp_path):
    given = ("--recipe", recipe, "--text", made / "text.txt", *FEW)
    on_other_device(("factorize", made / "dense", "-o", tmp_path / "out", *given))
    assert (tmp_path / "out" / "factorllm.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("--gates", "all-experts", "--coordinate"),
        ("--gates", "soft", "--quantize", "q4_0"),
        ("--train", "lora"),
    ],
)
def test_students_heal_there(how, made, tmp_path):
    on_other_device(heal_words(made, tmp_path / "healed", *how))
    assert (tmp_path / "healed" / "factorllm.json").exists()
