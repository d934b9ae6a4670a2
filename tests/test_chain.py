"""Chains of questions: what is pruned, what is counted, and that both engines answer only what may be answered."""

import json
import sys
from inspect import unwrap
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, around_texts, byte_tokenizer, save_dense
from test_export import byte_level_tokenizer, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from factorllm import FactorLLMError, evaluate
from factorllm.cli import main
from factorllm.exporting import export_gguf
from factorllm.measure import checkpoint_subject
from factorllm.measure.chain.answers import LoadedAnswers, grammar_of
from factorllm.measure.chain.plan import Question, read_chain
from factorllm.measure.chain.run import StepScore, compare, f1_of, follow, score
from factorllm.measure.gguf_subject import GgufSubject
from factorllm.measure.settings import EvalSettings
from factorllm.report import chain_table

CHAIN = {
    "documents": [
        {"text": "one", "places": ["1", "2"], "gold": [["joy", "1"]]},
        {"text": "two", "places": ["1", "2", "3"], "gold": [["fear", "3"], ["joy", "2"]]},
    ],
    "result": ["kind", "place"],
    "steps": [
        {"name": "kind", "prompt": "{{ text }}?", "answers": ["joy", "fear", "anger"], "most": 2},
        {"name": "place", "prompt": "{{ before }}{{ kind }} is in", "answers": "places", "prune": "none"},
        {"name": "why", "prompt": "{{ before }}because", "tokens": 4},
    ],
}


def write_chain(folder: Path, **changes) -> Path:
    path = folder / "my-chain.yaml"
    path.write_text(yaml.safe_dump(CHAIN | changes))
    return path


@pytest.fixture
def chain(tmp_path):
    return read_chain(write_chain(tmp_path))


def saying(**answers: str):
    """A model with an answer for each prompt's last line."""
    return lambda question: answers[question.prompt.splitlines()[-1].replace(" ", "_").rstrip("?")]


def test_each_answer_is_followed_and_what_is_pruned_is_not(chain):
    asked = []
    says = saying(one="joy, fear", two="fear", joy_is_in="none", fear_is_in="2", because="so it is")

    def ask(question: Question) -> str:
        asked.append(question)
        return says(question)

    followed = follow(chain, ask)
    assert [question.prompt for question in asked[:4]] == [
        "one?",
        "one? joy, fear\njoy is in",
        "one? joy, fear\nfear is in",
        "one? joy, fear\nfear is in 2\nbecause",
    ]
    assert asked[1].allowed == ("1", "2", "none")
    assert set(asked[0].allowed) == {"joy", "fear", "anger"} | {
        f"{one}, {other}" for one, other in product(["joy", "fear", "anger"], repeat=2) if one != other
    }
    assert asked[3].allowed == 4
    assert followed.found == {(0, ("fear", "2")), (1, ("fear", "2"))}
    assert [len(answers) for answers in followed.answers] == [2, 3, 2]


def test_agreement_given_the_dense_models_answers_and_by_its_own(chain):
    dense = follow(chain, saying(one="joy, fear", two="fear", joy_is_in="1", fear_is_in="3", because="x"))
    # It says the same of both places and reasons, but does not see the fear in the first document.
    student_says = saying(one="joy", two="fear", joy_is_in="1", fear_is_in="3", because="x")
    student = follow(chain, student_says)
    steps = compare(chain, student, dense, student_says)
    assert steps == [StepScore("kind", 2, 1 / 2, 1 / 2), StepScore("place", 3, 1, 2 / 3), StepScore("why", 3, 1, 2 / 3)]
    found = score(chain, student, dense, steps)
    assert found.f1 == {"student": pytest.approx(4 / 5), "dense": pytest.approx(4 / 6)}
    assert found.found == pytest.approx(4 / 5)
    assert "66.7%" in str([list(column.cells) for column in chain_table(found).columns])


def test_the_order_of_answers_in_a_line_does_not_matter_and_a_step_that_nobody_came_to_has_no_agreement(chain):
    first, second = (
        saying(one="joy, fear", two="joy", joy_is_in="none", fear_is_in="none"),
        saying(one="fear, joy", two="joy", joy_is_in="none", fear_is_in="none"),
    )
    dense, student = follow(chain, first), follow(chain, second)
    steps = compare(chain, student, dense, second)
    assert [(step.name, step.given, step.own) for step in steps] == [("kind", 1, 1), ("place", 1, 1)]
    assert score(chain, student, dense, steps).found == 1  # nothing, as the dense model
    assert f1_of(set(), {(0, ("joy",))}) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny dense models with room for a chain, by name; they are no student and dense model of each other."""
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(**BASE | {"max_position_embeddings": 256})
    for seed, name in enumerate(("dense", "other")):
        save_dense(config, root / name, seed)
    return root


@pytest.fixture
def model(models):
    return AutoModelForCausalLM.from_pretrained(models / "dense", dtype=torch.float32)


def greedy_among(model, prompt: str, answers: list[str]) -> str:
    """By hand, a byte a token, without a cache."""
    left, written = [f" {answer}\n" for answer in answers], ""
    while left[0] != written:
        tokens = byte_tokenizer()(prompt + written, return_tensors="pt").input_ids
        logits = model(tokens).logits[0, -1]
        byte = {text[len(written)]: byte_tokenizer()(text[len(written)]).input_ids[-1] for text in left}
        written += max(byte, key=lambda text: logits[byte[text]])
        left = [text for text in left if text.startswith(written)]
    return written.strip()


def test_a_loaded_model_chooses_greedily_among_what_is_allowed(model):
    ask, found = LoadedAnswers(model, byte_tokenizer()), set()
    answers = ["joy", "just so", "jo", "12", "1", "none"]
    for prompt in ("What?", "What? And", "What? Or", "Where is it:", "Why not", "Which of these", "a", "zz", "0 9"):
        assert ask(Question(prompt, tuple(answers))) == greedy_among(model, prompt, answers), prompt
        found.add(greedy_among(model, prompt, answers))
    assert len(found) > 2


def test_answers_that_no_tokens_make_are_refused(model):
    with pytest.raises(FactorLLMError, match="the model has no tokens that make the answer 'né'"):
        LoadedAnswers(model, byte_tokenizer())(Question("What?", ("none", "né")))


def test_a_line_ends_where_the_model_ends_it(model):
    ask, tokenizer = LoadedAnswers(model, byte_tokenizer()), byte_tokenizer()
    said = ask(Question("What is it?", 12))
    tokens = tokenizer("What is it?", return_tensors="pt").input_ids
    wanted = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :]
    assert said == tokenizer.decode(wanted, skip_special_tokens=True).partition("\n")[0].strip()
    assert ask(Question("What is it?", 1)) == tokenizer.decode(wanted[:1], skip_special_tokens=True).strip()


def test_a_model_that_computes_nan_is_not_taken_at_its_word(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FactorLLMError, match="NaN or infinity where it is to answer"):
        LoadedAnswers(model, byte_tokenizer())(Question("What?", ("yes", "no")))


def test_a_prompt_without_room_is_refused(model):
    with pytest.raises(FactorLLMError, match=r"a prompt has 300 tokens .* more than the 256 of the model's context"):
        LoadedAnswers(model, byte_tokenizer())(Question("x" * 300, ("yes", "no")))


def test_an_answer_comes_before_the_end_token_that_a_tokenizer_puts_behind_each_text(model):
    questions = [Question(f"{word}?", allowed) for word in ("What", "Where", "a") for allowed in (("joy", "fear"), 12)]
    said = [
        list(map(LoadedAnswers(model, around_texts(byte_tokenizer(), around)), questions))
        for around in ("<s> $A", "<s> $A </s>")
    ]
    assert said[0] == said[1]


@pytest.mark.engine
def test_llama_cpp_answers_before_the_end_token_that_a_file_puts_behind_each_text(tmp_path):
    pytest.importorskip("xllamacpp")
    chain, said = read_chain(write_chain(tmp_path)), []
    for around in ("<s> $A", "<s> $A </s>"):
        folder, file = tmp_path / str(len(said)), tmp_path / f"{len(said)}.gguf"
        config = LlamaConfig(**BASE | {"max_position_embeddings": 256})
        save_model(config, folder, around_texts(byte_level_tokenizer(), around))
        export_gguf(str(folder), file, "f32")
        with GgufSubject.of(file).answering() as ask:
            said.append(follow(chain, ask))
    assert said[0] == said[1]


@pytest.mark.engine
def test_llama_cpp_answers_as_transformers_does(tmp_path):
    pytest.importorskip("xllamacpp")
    chain, said = read_chain(write_chain(tmp_path)), set()
    for spread in (0.2, 0.3):
        folder, file = tmp_path / f"model-{spread}", tmp_path / f"{spread}.gguf"
        save_model(LlamaConfig(**BASE | {"max_position_embeddings": 256, "initializer_range": spread}), folder)
        export_gguf(str(folder), file, "f32")
        with GgufSubject.of(file).answering() as served:
            theirs = follow(chain, served)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert theirs == follow(chain, LoadedAnswers(model, AutoTokenizer.from_pretrained(folder)))
        said |= {answer for step in theirs.answers for _, answer in step.values()}
    assert len(said) > 3
    assert grammar_of(['a "b"', "c"]) == 'root ::= " a \\"b\\"\\n" | " c\\n"'


@pytest.fixture(scope="module")
def student(models, tmp_path_factory):
    from factorllm import Settings, factorize

    root = tmp_path_factory.mktemp("student")
    text = root / "text.txt"
    text.write_text("\n\n".join(f"the model of layer {n} is a stream of {n * 7} tokens" * 2 for n in range(200)))
    settings = Settings(tokens=2048, held_out_tokens=512, length=64, baseline=False)
    factorize(str(models / "dense"), root / "out", "S2A2E8", text=str(text), settings=settings)
    return root / "out"


def test_a_student_and_its_dense_model(models, student, tmp_path, monkeypatch, capsys):
    chain, out = write_chain(tmp_path), tmp_path / "found.json"
    monkeypatch.setitem(unwrap(evaluate).__kwdefaults__, "cache", tmp_path / "c")
    words = ["eval", str(student), "--against", str(models / "dense"), "--chain", str(chain), "-o", str(out)]
    monkeypatch.setattr(sys, "argv", ["factorllm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "given" in capsys.readouterr().out
    found = json.loads(out.read_text())["chain"]
    assert found["steps"][0]["name"] == "kind"
    assert found["steps"][0]["asked"] == 2
    monkeypatch.setattr(checkpoint_subject, "LoadedAnswers", lambda *_: pytest.fail("asked again"))
    again = evaluate(student, against=str(models / "dense"), chain=chain, settings=EvalSettings(tasks=()))
    assert json.loads(json.dumps(again.chain, default=vars)) == found


def test_the_dense_model_agrees_with_itself(models, tmp_path):
    chain = read_chain(write_chain(tmp_path))
    ask = LoadedAnswers(AutoModelForCausalLM.from_pretrained(models / "dense"), byte_tokenizer())
    followed = follow(chain, ask)
    assert all(step.given == step.own == 1 for step in compare(chain, followed, followed, ask))


def test_the_chain_that_comes_along_is_what_its_templates_make():
    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    from emotion_cause import documents

    chain = read_chain("emotion-cause")
    assert list(chain.documents) == documents()
    assert len({document["text"] for document in chain.documents}) == 50
    for document in chain.documents:
        assert document["text"] == " ".join(f"{clause}." for clause in document["clauses"])
        assert all(
            {place, reason} <= set(document["clauses"]) and place != reason for _, place, reason in document["gold"]
        )
    right = {(n, tuple(pair)) for n, each in enumerate(chain.documents) for pair in each["gold"]}

    def knowing(question: Question) -> str:
        """Who answers rightly finds all of it."""
        text, _, lines = question.prompt.rpartition("Text: ")[2].partition("\n")
        number = next(n for n, each in enumerate(chain.documents) if each["text"] == text)
        gold, last = chain.documents[number]["gold"], lines.splitlines()[-1]
        if last == "Emotions:":
            return ", ".join(kind for kind, _, _ in gold)
        if last.startswith("Cause of"):
            return "because"
        named = lines.splitlines()[1].split(" of ")[1].split(":")[0]
        place, reason = next(rest for kind, *rest in gold if kind == named)
        return reason if last == "Clause of that cause:" else place

    assert follow(chain, knowing).found == right


STEP = CHAIN["steps"][0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": []}, "steps: "),
        ({"more": 1}, "more: Extra inputs"),
        ({"result": ["place", "time"]}, "`result` names time, which is no step"),
        ({"steps": [STEP, STEP], "result": ["kind"]}, "each step needs a name of its own"),
        ({"steps": [STEP | {"name": "before"}], "result": ["before"]}, "each step needs a name of its own"),
        ({"steps": [STEP | {"tokens": 5}], "result": ["kind"]}, "either `answers`"),
        ({"steps": [STEP | {"answers": None}], "result": ["kind"]}, "either `answers`"),
        ({"steps": [STEP | {"prompt": "{{ txt }}"}], "result": ["kind"]}, "document 1: the prompt of step kind.*txt"),
        ({"steps": [STEP | {"prompt": "{{ text"}], "result": ["kind"]}, "the prompt of step kind cannot be used"),
        ({"steps": [STEP | {"prompt": " "}], "result": ["kind"]}, "the prompt of step kind is empty"),
        ({"steps": [STEP | {"prompt": "{{ text.__class__.mro() }}"}], "result": ["kind"]}, "unsafe"),
        ({"steps": [STEP | {"answers": "place"}], "result": ["kind"]}, "no list of answers under 'place'"),
        ({"steps": [STEP | {"answers": ["a"]}], "result": ["kind"]}, "fewer than two answers"),
        ({"steps": [STEP | {"answers": ["a", "a"]}], "result": ["kind"]}, "stands there twice"),
        ({"steps": [STEP | {"answers": ["a", "b,c"]}], "result": ["kind"]}, "holds a comma"),
        ({"steps": [STEP | {"answers": ["a", "b" * 101]}], "result": ["kind"]}, "101 characters, more than 100"),
        ({"steps": [STEP | {"answers": ["a", " b"]}], "result": ["kind"]}, "no text of one line"),
        ({"steps": [STEP | {"answers": ["a", "b\nc"]}], "result": ["kind"]}, "no text of one line"),
        ({"steps": [STEP | {"answers": [str(n) for n in range(40)]}], "result": ["kind"]}, "make 1600 lines"),
        ({"documents": []}, "has no documents"),
        ({"documents": [{"text": "a", "places": ["1"]}]}, "document 1 has no `gold`"),
        ({"documents": [CHAIN["documents"][0] | {"gold": [["joy"]]}]}, "one text for each of kind, place"),
        ({"documents": [CHAIN["documents"][0] | {"kind": "x"}]}, "has a key 'kind', the name of a step"),
        ({"documents": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_chains_that_cannot_be_asked_are_refused(changes, says, tmp_path):
    short = [one | {"gold": [found[:1] for found in one["gold"]]} for one in CHAIN["documents"]]
    fitting = {"documents": short} if changes.get("result") == ["kind"] else {}
    with pytest.raises(FactorLLMError, match=says):
        read_chain(write_chain(tmp_path, **fitting | changes))


@pytest.mark.parametrize("content", ["", "[]", "5", "a: [", "1: 2", "\x00"])
def test_files_that_are_no_chain_are_refused(content, tmp_path):
    (tmp_path / "chain.yaml").write_text(content)
    with pytest.raises(FactorLLMError, match=r"chain\.yaml"):
        read_chain(tmp_path / "chain.yaml")
    with pytest.raises(FactorLLMError, match="emotion-cause"):
        read_chain("emotion-causes")
