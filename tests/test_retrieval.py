"""Passages of the user's files, given to a model where it finds that they help."""

import errno
import os
import sys
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
import torch
from conftest import BASE, words
from forked import free_port
from test_export import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from factorllm import FactorLLMError, serve
from factorllm.engines.base import Options
from factorllm.engines.llamacpp import open_server, server_params
from factorllm.exporting import export_gguf
from factorllm.serving import retrieval
from factorllm.serving.proxy import Proxy
from factorllm.serving.retrieval import Judge, Library, Retrieval, question_of, read_passages, with_passages
from factorllm.serving.settings import ServeSettings

FACTS = {
    "bridge.txt": "The Velmora bridge was opened in 1847.\n\nIt is made of tin.",
    "more/museum.md": "The Taskin museum shows amber.",
    "notes.txt": "Nothing of note.",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FACTS.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text(text)
    (tmp_path / "files" / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "files"


@pytest.fixture
def library(folder):
    pytest.importorskip("bm25s")
    return Library(folder)


def test_what_is_read(folder):
    found = read_passages(folder)
    assert [passage.source for passage in found] == sorted(FACTS)
    assert found[0].text == FACTS["bridge.txt"]


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path):
    text = "\n\n".join([words(40, 1), words(700, 2), words(100, 3), words(40, 4)])
    (tmp_path / "long.txt").write_text(text)
    found = read_passages(tmp_path)
    assert " ".join(passage.text for passage in found).split() == text.split()
    assert max(len(passage.text) for passage in found) <= 900
    assert len(found) < len(text) / 450


def test_texts_without_spaces_are_cut_too(tmp_path):
    (tmp_path / "long.txt").write_text("文" * 2000)
    assert [len(passage.text) for passage in read_passages(tmp_path)] == [900, 900, 200]


def test_a_long_word_is_cut_before_lines_are_made(tmp_path):
    """Python's wrap copies what is left of a word for each line: of 8 MB without spaces for a quarter of a minute."""
    (tmp_path / "a.json").write_text("short " + "x" * 2000 + " end")
    assert [passage.text for passage in read_passages(tmp_path)] == ["short", "x" * 900, "x" * 900, "x" * 200 + " end"]


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(FactorLLMError, match=r"holds no text; give a folder with files of \.txt"):
        read_passages(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(folder, monkeypatch):
    def closed(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", closed)  # root may read all
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FactorLLMError, match=r"\.\w+ cannot be used \(.*Permission denied.*; let it be read$"):
        read_passages(folder)


def test_without_the_library_it_is_refused(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(FactorLLMError, match=r"pip install 'factorllm\[retrieval\]'"):
        serve("model.gguf", "llamacpp", retrieval=folder)


def test_only_llamacpp_judges(folder):
    with pytest.raises(FactorLLMError, match="use --engine llamacpp"):
        serve("model", "vllm", retrieval=folder)


def test_drafts_and_passages_are_not_mixed(folder):
    with pytest.raises(FactorLLMError, match="leave one of them out"):
        serve("model", "llamacpp", lossless="dense", retrieval=folder)


def test_words_find_passages(library):
    assert library.search("When was the Velmora bridge opened?")[0] == 0
    assert library.search("What does the museum show?")[0] == 1
    assert library.search("Xyzzy?") == library.search("the of ?") == []


def test_what_is_compared_with_was_not_found(library):
    texts, unrelated = library.candidates("When was the Velmora bridge opened?")
    assert (texts, unrelated) == ([FACTS["bridge.txt"]], FACTS["more/museum.md"])
    texts, unrelated = library.candidates("Velmora museum: nothing?")
    assert (texts, unrelated) == (list(FACTS.values()), "")


@pytest.mark.parametrize(
    ("gains", "kept"),
    [([4.0, 3.0, 1.6, 0.1], "1100"), ([1.6, 1.4], "10"), ([1.2, 0.3], "00"), ([], "")],
)
def test_passages_that_bring_little_or_less_than_others_are_not_kept(gains, kept):
    assert retrieval.helpful(gains) == [each == "1" for each in kept]


def test_passages_stand_before_the_conversation():
    asked = [{"role": "user", "content": "Why?"}]
    (system, question) = with_passages(asked, ["one", "two"])
    assert system["role"] == "system"
    assert system["content"].endswith("\n\none\n\ntwo")
    assert [question] == asked
    for brief in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        (own, question) = with_passages([{"role": "system", "content": brief}, *asked], ["one", "two"])
        assert own == {"role": "system", "content": f"Be brief.\n\n{system['content']}"}
        assert [question] == asked
    assert with_passages(["no message", *asked], ["one", "two"]) == [system, "no message", *asked]  # refused further on


@pytest.mark.parametrize(
    ("messages", "question"),
    [
        ([{"role": "user", "content": " Why? "}], "Why?"),
        ([{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url"}]}], "Why?"),
        ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], ""),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "user", "content": [{"text": 5}]}], ""),
        (["Why?"], ""),
        ([], ""),
        (None, ""),
    ],
)
def test_the_question(messages, question):
    assert question_of(messages) == question


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(LlamaConfig(**BASE | {"max_position_embeddings": 512}), folder / "dense")
    export_gguf(str(folder / "dense"), folder / "dense.gguf", "f32")
    return folder


@pytest.fixture(scope="module")
def address(model):
    server = open_server(server_params(str(model / "dense.gguf"), Options(context=512, decode_threads=1)), "load")
    yield server.listening_address
    del server


@pytest.mark.engine
def test_gains_are_the_models_likelihoods(model, address):
    """Of the same conversation in transformers."""
    passages, question = ["The bridge is old.", "Tin is a metal."], "How old is it? ž"
    tokenizer, dense = (kind.from_pretrained(model / "dense") for kind in (AutoTokenizer, AutoModelForCausalLM))

    def mean(passage):
        content = with_passages([], [passage])[0]["content"]
        before = tokenizer(f"<s>system: {content}</s><s>user: ", add_special_tokens=False)
        asked = tokenizer(question, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[*before["input_ids"], *asked]])
        with torch.no_grad():
            said = dense(tokens).logits[0].log_softmax(-1)
        places = range(len(tokens[0]) - len(asked) - 1, len(tokens[0]) - 1)
        return sum(said[place, token] for place, token in zip(places, asked, strict=True)) / len(asked)

    wanted = [(mean(passage) - mean("Nothing.")).item() for passage in passages]
    assert Judge(address).gains(question, passages, "Nothing.") == pytest.approx(wanted, abs=2e-3)
    assert abs(wanted[0] - wanted[1]) > 0.01


def test_what_helps_is_kept_and_nothing_else_changes(library, monkeypatch):
    class Told:
        def __init__(self, *_):
            pass

        def gains(self, question, passages, unrelated):
            assert unrelated not in passages
            return [3.0 if "1847" in passage else 1.4 for passage in passages]

    monkeypatch.setattr(retrieval, "Judge", Told)
    front = Retrieval(library, "http://nowhere", "tiny")

    def sent(question, **more):
        body = {"messages": [{"role": "user", "content": question}]} | more
        with front.place("/v1/chat/completions", body) as (where, changed):
            assert where == "http://nowhere"
            return body, changed

    body, changed = sent("Was the Velmora bridge or the museum opened?", seed=3)
    assert changed == body | {"messages": with_passages(body["messages"], [FACTS["bridge.txt"]])}
    for question in ("What does the museum show?", "Xyzzy?"):
        body, changed = sent(question)
        assert changed == body
    with front.place("/v1/completions", {"prompt": "The Velmora bridge"}) as (_, changed):
        assert changed == {"prompt": "The Velmora bridge"}
    counted = dict(line.split() for line in front.metrics().splitlines())
    assert counted["factorllm_retrieval_questions_total"] == "3"
    assert counted["factorllm_retrieval_questions_with_passages_total"] == "1"
    assert counted["factorllm_retrieval_passages_kept_total"] == "1"


@pytest.mark.engine
def test_what_cannot_be_judged_is_told(model, folder):
    pytest.importorskip("bm25s")
    (folder / "bridge.txt").write_text("The Velmora bridge " + "is long " * 100)
    server = open_server(server_params(str(model / "dense.gguf"), Options(context=128, decode_threads=1)), "load")
    with pytest.raises(FactorLLMError, match=r"cannot judge passages.*more --context may help"):
        Retrieval(Library(folder), server.listening_address, "tiny").select("How long is the Velmora bridge?")


@contextmanager
def running(proxy):
    thread = threading.Thread(target=ThreadingHTTPServer.serve_forever, args=(proxy, 0.05))
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


@pytest.mark.engine
def test_an_answer_is_that_of_the_conversation_with_its_passages(library, address, monkeypatch):
    monkeypatch.setattr(retrieval, "helpful", lambda gains: [True] * len(gains))
    asked = [{"role": "user", "content": "When was the Velmora bridge opened?"}]
    with running(Proxy("127.0.0.1", 0, Retrieval(library, address, "tiny"))) as through:
        said = answer(through, asked)
    assert said == answer(address, with_passages(asked, [FACTS["bridge.txt"]])) != answer(address, asked)


def answer(address, messages):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0)
    return reply.choices[0].message.content


@pytest.mark.engine
def test_serve(model, library, folder, monkeypatch):
    said, port = [], free_port()

    def ask(proxy):
        with running(proxy) as address:
            assert answer(address, [{"role": "user", "content": "The Velmora bridge?"}])
            with urlopen(f"{address}/v1/models") as models, urlopen(f"{address}/metrics") as metrics:
                assert b'"dense.gguf"' in models.read()
                assert b"factorllm_retrieval_questions_total 1\n" in metrics.read()

    monkeypatch.setattr(Proxy, "serve_forever", ask)
    settings = ServeSettings(port=port, context=512, threads=1)
    serve(str(model / "dense.gguf"), "llamacpp", settings=settings, say=said.append, retrieval=folder)
    assert "passages to look in: 3" in said
    assert any(f"at http://127.0.0.1:{port}/v1" in line for line in said)
