"""Prompts that the dense model reads and its student answers: exactly that, and refused where llama.cpp cannot."""

from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import openai
import pytest
import torch
from conftest import BASE, some_tokens
from forked import free_port
from test_evaluate import write_lines
from test_export import byte_level_tokenizer, factorized, save_model
from test_retrieval import running
from transformers import AutoModelForCausalLM, LlamaConfig

from factorllm import FactorLLMError, serve
from factorllm.dense.generate import CACHE
from factorllm.engines import EngineProcess, Options
from factorllm.exporting import export_gguf
from factorllm.measure.scores import evaluate
from factorllm.measure.settings import EvalSettings
from factorllm.runs.settings import Settings
from factorllm.serving.proxy import Proxy
from factorllm.serving.settings import ServeSettings

pytestmark = pytest.mark.engine

CONTEXT = 128
PROMPT = "the router of a token"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student and its dense model, as folders and as GGUF files."""
    root = tmp_path_factory.mktemp("pair")
    (root / "text.txt").write_text("\n\n".join(f"the model number {n} of a stream" for n in range(400)))
    small = Settings(tokens=2048, held_out_tokens=512, length=64)
    config = LlamaConfig(**BASE | {"max_position_embeddings": 512})
    factorized(config, root, root / "text.txt", small).rename(root / "student")
    for name in ("dense", "student"):
        export_gguf(str(root / name), root / f"{name}.gguf", "f32")
    return root


def asked(pair, reader=None):
    options = Options(context=CONTEXT, decode_threads=1, reader=reader and str(reader))
    return EngineProcess("llamacpp", pair / "student.gguf", options)


@pytest.fixture(scope="module")
def models(pair):
    return [AutoModelForCausalLM.from_pretrained(pair / name) for name in ("dense", "student")]


def handed_over(models, prompt: list[int], following: list[int]) -> list[float]:
    """Log-probabilities of what follows, by the student on the dense model's cache of all of the prompt but its end."""
    dense, student = models
    with torch.no_grad():
        cache = dense(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        rest = torch.tensor([[prompt[-1], *following]])
        said = student(rest, **{CACHE: cache}).logits[0].log_softmax(-1)
    return [said[place, token].item() for place, token in enumerate(following)]


def test_the_student_goes_on_from_the_dense_models_cache(pair, models):
    tokens = some_tokens(models[0].config, rows=1, length=40)[0].tolist()
    prompt, following = tokens[:28], tokens[28:]
    wanted = handed_over(models, prompt, following)
    own = handed_over([models[1], models[1]], prompt, following)
    with asked(pair, pair / "dense.gguf") as process:
        found = [value for value, _ in process.score(prompt, following)]
        again = [value for value, _ in process.score(prompt, following)]
        likeliest = process.next_tokens(prompt, 4)
    assert found == pytest.approx(wanted, abs=1e-2)  # f16 in the cache
    assert again == pytest.approx(found, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(wanted, own, strict=True)) > 0.02  # else this shows nothing
    assert dict(likeliest).get(following[0], wanted[0]) == pytest.approx(wanted[0], abs=1e-2)


def test_a_student_that_reads_its_own_prompt_is_itself(pair):
    tokens = list(range(40, 60))
    with asked(pair, pair / "student.gguf") as handed, asked(pair) as alone:
        assert handed.generate(tokens, 24) == alone.generate(tokens, 24)


def test_a_prompt_of_one_token_is_the_students(pair):
    with asked(pair, pair / "dense.gguf") as handed, asked(pair) as alone:
        assert handed.generate([65], 8) == alone.generate([65], 8)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {}])
def test_another_models_prompts_are_refused(change, pair, tmp_path):
    tokenizer = byte_level_tokenizer()
    if not change:  # but the vocabulary
        tokenizer.add_tokens([f"<{n}>" for n in range(8)])
    save_model(LlamaConfig(**BASE | {"max_position_embeddings": 512} | change), tmp_path / "other", tokenizer)
    export_gguf(str(tmp_path / "other"), tmp_path / "other.gguf", "f32")
    with pytest.raises(FactorLLMError, match="cannot hand over to the student what the dense model has read"):
        asked(pair, tmp_path / "other.gguf")


def test_a_task_is_asked_so_and_kept_apart_from_the_students_own_answers(pair, tmp_path):
    questions = [{"context": f"the model number {n} of", "continuation": "a stream"} for n in range(6)]
    write_lines(tmp_path / "lambada_openai.jsonl", questions)
    settings = EvalSettings(tasks=("lambada_openai",), data=tmp_path)
    files = {"against": str(pair / "dense.gguf"), "settings": settings, "cache": tmp_path / "cache"}

    def entries():
        return len(list((tmp_path / "cache").iterdir()))

    evaluate(pair / "student.gguf", **files)
    assert entries() == 2
    evaluate(pair / "student.gguf", dense_prompt=True, **files)
    assert entries() == 3  # the dense model was not asked again


def test_what_cannot_be_measured_so_is_refused(pair):
    settings = EvalSettings(tasks=())
    with pytest.raises(FactorLLMError, match=r"is for \.gguf files; `factorllm export` writes them"):
        evaluate(pair / "student", against=str(pair / "dense"), text="x", dense_prompt=True, settings=settings)
    with pytest.raises(FactorLLMError, match="name its file with --against"):
        evaluate(pair / "student.gguf", text="x", dense_prompt=True, settings=settings)


def test_serve(pair, monkeypatch):
    """The answers are those of the engine that was shown to go on from the dense model's cache."""
    port, said = free_port(), []
    prompts = [f"{PROMPT} {word}" for word in ("is", "was", "of a layer", "and")]
    with asked(pair, pair / "dense.gguf") as process:
        wanted = [process.complete(process.tokenize(prompt, special=True), 12, []) for prompt in prompts]

    def ask(proxy):
        with running(proxy) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

            def complete(prompt, **more):
                body = {"model": "any", "max_tokens": 12, "temperature": 0} | more
                return client.completions.create(prompt=prompt, **body).choices[0].text

            with ThreadPoolExecutor(4) as pool:  # of two slots
                assert list(pool.map(complete, prompts)) == wanted
            assert complete(prompts[0]) == wanted[0]  # whose slot has read it already
            messages = [{"role": "user", "content": PROMPT}]
            chat = client.chat.completions.create(model="any", messages=messages, max_tokens=8, temperature=0)
            assert chat.usage.prompt_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1
            assert chat.model == "student.gguf"
            for more in ({"n": 2}, {"prompt": ["a", "b"]}, {"prompt": "x" * 300}):
                with pytest.raises(openai.BadRequestError):
                    complete(**{"prompt": PROMPT} | more)
            assert complete(prompts[1]) == wanted[1]
            with urlopen(f"{address}/v1/models") as known:
                assert b'"student.gguf"' in known.read()

    monkeypatch.setattr(Proxy, "serve_forever", ask)
    settings = ServeSettings(port=port, context=CONTEXT, threads=1, parallel=2)
    dense = str(pair / "dense.gguf")
    serve(str(pair / "student.gguf"), "llamacpp", settings=settings, say=said.append, dense_prompt=dense)
    assert any("reads each prompt" in line for line in said)
    assert not list(pair.glob("slot-*"))


def test_it_is_alone_and_through_llamacpp(tmp_path):
    with pytest.raises(FactorLLMError, match="--lossless with --dense-prompt was never measured"):
        serve(str(tmp_path), "llamacpp", lossless="dense", dense_prompt="dense")
    with pytest.raises(FactorLLMError, match=r"--dense-prompt works through llama\.cpp, not in vllm"):
        serve(str(tmp_path), "vllm", dense_prompt="dense")
