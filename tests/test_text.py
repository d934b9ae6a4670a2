"""Text of users: how it is split into parts that share no document, and what is read of files of all makers."""

import gzip
import io
import json
import os
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import around_texts, byte_tokenizer
from rich.console import Console
from transformers import AutoModelForCausalLM, BatchEncoding

from factorllm import FactorLLMError, factorize
from factorllm.dense.opening import opened
from factorllm.measure.scores import evaluate
from factorllm.measure.settings import EvalSettings
from factorllm.runs.settings import Settings
from factorllm.text import read_calibration_text
from factorllm.text.documents import Documents
from factorllm.text.parts import open_text
from factorllm.text.sampling import chat_opening, sample_from_model

FIRST, END = 256, 257
SMALL = Settings(tokens=512, held_out_tokens=128, length=32)
SMALL_BY_ONE = Settings(tokens=16 * 31, held_out_tokens=4 * 31, length=31)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write_records(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(text, settings=SMALL, console=None, tokenizer=None):
    return read_calibration_text(str(text), tokenizer or byte_tokenizer(), settings, console=console)


def letters(tokens) -> set[int]:
    """Which documents of one letter each are in a part."""
    return set(tokens.flatten().tolist()) - {END}


def said_of(text, settings=SMALL) -> str:
    console = Console(record=True, width=1000, file=io.StringIO())
    read(text, settings, console)
    return console.export_text()


# How it is split.


def test_parts_are_packed_with_the_end_token_between_documents(tmp_path):
    documents = ["first document", "second one", "the third"]
    parts = open_text(write_records(tmp_path / "t.jsonl", documents), byte_tokenizer(), Settings(length=8))
    flat = parts.take(100).flatten()
    assert parts.take(1).shape == (0, 8)
    random.Random(0).shuffle(documents)
    wanted = byte_tokenizer()("</s>".join([*documents, ""])).input_ids
    assert flat.tolist() == wanted[: len(wanted) // 8 * 8]


def opening_tokenizer():
    """As Llama's: what it is given, it begins with its first token."""
    return around_texts(byte_tokenizer(), "<s> $A")


def test_each_part_begins_as_all_that_the_model_is_given(tmp_path, dense_folder):
    """What a part holds else is the same, in sequences of the same length."""
    text = write_records(tmp_path / "t.jsonl", [f"{number} " * 20 for number in range(60)])
    with_it, without = read(text, tokenizer=opening_tokenizer()), read(text, SMALL_BY_ONE)
    for name in ("calibration", "held_out"):
        tokens = getattr(with_it, name)
        assert tokens.shape[1] == SMALL.length
        assert (tokens[:, 0] == FIRST).all()
        assert torch.equal(tokens[:, 1:], getattr(without, name)[: len(tokens)])
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    sampled = open_text(None, opening_tokenizer(), SMALL, lambda: model).take(2)
    assert sampled.shape == (2, SMALL.length)
    after_it = sample_from_model(model, byte_tokenizer(), 2, SMALL.length - 1, seed=0, opening=[FIRST])
    assert torch.equal(sampled, torch.cat([torch.full((2, 1), FIRST), after_it], dim=1))


def test_a_prompt_begins_as_all_that_the_model_is_given():
    tokenizer, plain = opening_tokenizer(), byte_tokenizer()("abc").input_ids
    assert opened(tokenizer, "abc") == opened(tokenizer, "<s>abc") == [FIRST, *plain]
    assert opened(byte_tokenizer(), "abc") == plain


@pytest.mark.parametrize("length", [3, 20, 40, 300, 5000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_document_is_both_calibrated_on_and_held_out(length, seed, tmp_path):
    chooser = random.Random(seed)
    records = [{"text": chr(200 + i) * chooser.randint(length // 3, length)} for i in range(max(30_000 // length, 3))]
    settings = SMALL.model_copy(update={"seed": seed})
    text = read(write_records(tmp_path / "t.jsonl", records), settings, tokenizer=by_character())
    assert text.calibration.shape == (16, 32)
    assert text.held_out.shape == (4, 32)
    assert not text.cut
    assert not letters(text.calibration) & letters(text.held_out)


def by_character():
    """A tokenizer with a token for each character, whatever it is."""

    class ByCharacter:
        eos_token_id, added_tokens_decoder, chat_template = END, {}, None

        def __call__(self, document, **options):
            return type("Encoding", (), {"input_ids": list(map(ord, document))})

    return ByCharacter()


def test_the_held_out_part_does_not_depend_on_the_number_of_tokens(tmp_path):
    text = write_records(tmp_path / "t.jsonl", [{"text": letter * 300} for letter in "abcdefghij"])
    one, other = (read(text, SMALL.model_copy(update={"tokens": tokens})) for tokens in (32, 2000))
    assert torch.equal(one.held_out, other.held_out)
    assert torch.equal(one.calibration, other.calibration[:1])


@pytest.mark.parametrize("seed", range(5))
def test_a_long_document_among_short_ones_is_learned_from_and_not_lost(seed, tmp_path):
    records = [{"text": "b" * 5000}, *({"text": letter * 20} for letter in "acdefghijk")]
    settings = Settings(tokens=4000, held_out_tokens=128, length=32, seed=seed)
    text = read(write_records(tmp_path / "t.jsonl", records), settings)
    assert "b" not in byte_tokenizer().decode(text.held_out.flatten())


def test_a_document_that_stands_twice_in_the_text_is_one_document(tmp_path):
    records = [{"text": letter * 50} for letter in "abcdefghijklmnopqrst"]
    text = write_records(tmp_path / "t.jsonl", records + records)
    found = read(text)
    assert not letters(found.calibration) & letters(found.held_out)
    assert "20 documents of" in said_of(text)
    once = read(write_records(tmp_path / "once.jsonl", records))
    assert letters(once.calibration) <= letters(found.calibration)


@pytest.mark.parametrize("records", [["a" * 64 + "b" * 32 + "c" * 3000], ["A title", "b" * 3000]])
def test_one_document_is_cut_and_that_is_said(records, tmp_path):
    path = write_records(tmp_path / "book.jsonl", records)
    text = read(path, SMALL.model_copy(update={"held_out_tokens": 64}))
    assert text.cut
    assert "cut from one document" in text.origin
    assert "one and the same are learned from and measured on" in said_of(path)
    if len(records) == 1:  # a sequence between them is lost
        assert [letters(part) for part in (text.held_out, text.calibration)] == [{ord("a") - 33}, {ord("c") - 33}]


def test_a_checkpoint_says_that_its_text_was_one_document(dense_folder, tmp_path):
    (tmp_path / "book.txt").write_text("word " * 1500)
    settings = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)
    factorize(str(dense_folder), tmp_path / "out", "S2A2E8", text=str(tmp_path / "book.txt"), settings=settings)
    for name in ("factorllm.json", "README.md"):
        assert "held-out and calibration text are cut from one document" in (tmp_path / "out" / name).read_text()


def test_eval_measures_on_what_factorize_held_out_of_long_documents(dense_folder, tmp_path):
    text = write_records(tmp_path / "t.jsonl", [{"text": letter * 900} for letter in "abcde"])
    settings = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)
    made = factorize(str(dense_folder), tmp_path / "out", "S2A2E8", text=text, settings=settings)
    found = evaluate(tmp_path / "out", text=text, settings=EvalSettings(tasks=()))
    assert found.perplexity["student"] == pytest.approx(made.row("student").perplexity, rel=1e-5)


def test_text_that_is_too_short(tmp_path):
    text = write_records(tmp_path / "t.jsonl", [{"text": letter * 99} for letter in "abcde"])
    with pytest.raises(FactorLLMError, match="128 tokens that must be held out"):
        read(write_records(tmp_path / "s.jsonl", ["a few words"]))
    with pytest.raises(FactorLLMError, match=r"take at least \d+ off --tokens") as refusal:
        read(text)
    too_many = int(str(refusal.value).split(" off --tokens")[0].split()[-1])
    read(text, SMALL.model_copy(update={"tokens": SMALL.tokens - too_many}))
    with pytest.raises(FactorLLMError, match="too short"):
        read(text, SMALL.model_copy(update={"tokens": SMALL.tokens - too_many + 32}))


# What is text, and what are control tokens.


def test_control_tokens_in_a_document_are_letters_unless_it_was_formatted_for_the_model(tmp_path):
    def tokens(document):
        parts = open_text(write_records(tmp_path / "t.jsonl", [document]), byte_tokenizer(), Settings(length=8))
        return parts.take(9).flatten().tolist()

    html = tokens("it is <s>wrong</s> right, and so on")
    assert 256 not in html
    assert END not in html
    for formatted in ("<s>user: hi</s><s>assistant: hello again", "Q: a question A: an answer</s>"):
        found = tokens(formatted)
        assert found == (byte_tokenizer()(formatted.removesuffix("</s>") + "</s>").input_ids)[: len(found)]


# What is read.

ROWS = ["first", "second"]
CONVERSATION = "<s>user: hi</s><s>assistant: hello</s>"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("upper.TXT", "first\n\nsecond", ROWS),
        ("upper.JSONL", '{"text": "first"}\n{"text": "second"}', ROWS),
        ("crlf.txt", "first\r\n\r\nsecond\r\n", ROWS),
        ("spaces.txt", "first\n \t \n\n\nsecond", ROWS),
        ("bom.txt", "\ufefffirst\n\nsecond", ROWS),
        ("bom.jsonl", '\ufeff{"text": "first"}\n{"text": "second"}', ROWS),
        ("bom.json", '\ufeff["first", "second"]', ROWS),
        ("strings.json", '["first", "second"]', ROWS),
        ("strings.jsonl", '"first"\n"second"', ROWS),
        ("columns.json", '{"id": [1, 2], "text": ["first", "second"]}', ROWS),
        ("pandas.json", '{"text": {"0": "first", "1": "second"}, "id": {"0": 1, "1": 2}}', ROWS),
        ("lines.json", '{"text": "first"}\n{"text": "second"}\n', ROWS),
        ("one.json", '{"text": "first"}', ["first"]),
        ("mapping.json", '{"a": {"extract": "first"}, "b": "second", "c": {"text": "third"}}', ["first", "third"]),
        ("titles.json", '{"a": "first", "b": "second"}', ROWS),
        ("nested.json", '{"version": "1.1", "data": [{"text": "first"}, {"text": "second"}]}', ROWS),
        (
            "gaps.jsonl",
            '{"text": "first"}\n{"text": null}\n{"text": 7}\n{"text": [["a"]]}\n8\nnull\n["x"]\n"second"',
            ROWS,
        ),
        ("second-key.jsonl", '{"text": null, "content": "first"}\n{"text": "second", "content": "x"}', ROWS),
        ("nul.txt", "fi\0rst of all\n\nsecond", ["fi\0rst of all", "second"]),
        ("half.txt", b"a half \xed\xa0\xbd of it\n\nsecond", ["a half \ufffd of it", "second"]),
        ("half.jsonl", '{"text": "a half \\ud83d"}\n{"text": "\\ud83d\\ude00"}', ["a half \ufffd", "\U0001f600"]),
        ("chat.jsonl", json.dumps({"messages": CHAT}), [CONVERSATION]),
        ("chat.json", json.dumps({"messages": [CHAT, CHAT]}), [CONVERSATION] * 2),
        (
            "sharegpt.json",
            json.dumps([{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]),
            [CONVERSATION],
        ),
        (
            "parts.jsonl",
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}]}),
            ["<s>user: hi</s>"],
        ),
        (
            "half-chat.jsonl",
            json.dumps({"messages": [{"role": "user", "content": "\ud83d"}]}),
            ["<s>user: \ufffd</s>"],
        ),
        ("odd-chat.jsonl", '{"messages": [{"role": "user"}]}\n{"messages": []}\n"first"', ["first"]),
        ("text-and-chat.jsonl", json.dumps({"messages": CHAT, "text": "first"}), ["first"]),
    ],
)
def test_text_of_many_makers(name, content, wanted, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [text.strip() for text in Documents(str(path), byte_tokenizer())] == wanted
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert [text.strip() for text in Documents(str(zipped), byte_tokenizer())] == wanted


def test_parquet_of_many_makers(tmp_path):
    def found(table) -> list[str]:
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        return list(Documents(str(tmp_path / "t.parquet"), byte_tokenizer()))

    halved = pyarrow.array([b"a half \xed\xa0\xbd", b"second", None], pyarrow.binary())
    for kind in (pyarrow.string(), pyarrow.large_string()):
        column = halved.view(pyarrow.string()).cast(kind, safe=False)
        assert found(pyarrow.table({"text": column, "id": [1, 2, 3]})) == ["a half \ufffd", "second"]
    assert found(pyarrow.table({"messages": [CHAT, None]})) == [CONVERSATION]
    assert found(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("utf16.txt", "some words\n\nmore".encode("utf-16"), "can't decode byte 0xff.*save it as UTF-8"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16-le"), "is no UTF-8: line 1 is full of NUL"),
        ("latin1.txt", "un café".encode("latin-1"), "can't decode byte 0xe9.*save it as UTF-8"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 of text file .*fetch the file again where it was cut"),
        ("cut.json", b'[{"text": "a"}, {"te', "cut.json cannot be used"),
        ("deep.json", b"[" * 100_000, "deep.json cannot be used"),
        ("cut.txt.gz", gzip.compress(b"words " * 100, mtime=0)[:-20], "cut.txt.gz cannot be used"),
        ("no.txt.gz", b"words", "no.txt.gz cannot be used"),
        ("keys.jsonl", b'{"body": "a", "id": 1}\n{"body": "b"}', "its records have the keys body, id, none of text"),
        ("numbers.json", b"[1, 2]", "no keys, but are of the type int"),
        ("blank.jsonl", b'{"text": " "}', "holds no text: its records have the keys text"),
        ("empty.txt", b"", "too short: it has 0 of the 128 tokens"),
        ("empty.json", b" \n", "too short: it has 0 of the 128 tokens"),
        ("empty.parquet", b"", "empty.parquet cannot be used"),
        ("table.csv", b"a,b", "not a kind of text that is read"),
        ("folder", None, "is a folder"),
        ("missing.JSONL", None, "no such text file"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_the_reason(name, content, says, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(FactorLLMError, match=says):
        read(path)


def test_what_can_be_read_once_only_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for text in (tmp_path / "pipe.txt", "/dev/null"):
        with pytest.raises(FactorLLMError, match="is no ordinary file, and a text is read more than once; save it as"):
            next(iter(Documents(str(text))))


def test_conversations_need_a_chat_template_that_takes_them(tmp_path):
    path = write_records(tmp_path / "t.jsonl", [{"messages": CHAT}] * 3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(FactorLLMError, match="tokenizer has no chat template"):
        read(path, tokenizer=tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(FactorLLMError, match=r"holds no text: .*roles must alternate"):
        read(path, tokenizer=tokenizer)


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}</s>{% endfor %}"
)
"""As LLaVA, Idefics 3 and SmolVLM have them."""


def test_a_chat_template_that_wants_contents_in_parts_gets_them(tmp_path):
    """Of a plain text it writes nothing, and the calibration text was `user: </s>assistant: </s>`."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PARTS
    text = write_records(tmp_path / "t.jsonl", [{"messages": CHAT}])
    assert list(Documents(text, tokenizer)) == ["user: hi</s>assistant: hello</s>"]
    assert tokenizer.decode(chat_opening(tokenizer)) == "user: "


def test_records_without_a_text_are_counted_and_that_is_said(tmp_path):
    records = [{"text": letter * 50} for letter in "abcdefghijklmnopqrst"]
    text = write_records(tmp_path / "t.jsonl", [*records, {"text": None}, {"title": "x"}, 5])
    assert "3 records of" in said_of(text)
    assert said_of(write_records(tmp_path / "whole.jsonl", records)) == ""


def test_what_a_tokenizer_cannot_take_is_refused(tmp_path):
    def fails(document, **options):
        if document:
            raise TypeError("TextEncodeInput must be Union")
        return BatchEncoding({"input_ids": []})

    tokenizer = by_character()
    type(tokenizer).__call__ = staticmethod(fails)
    with pytest.raises(FactorLLMError, match="the document that begins with 'some words' cannot be used"):
        read(write_records(tmp_path / "t.jsonl", ["some words"]), tokenizer=tokenizer)


def test_a_text_that_comes_late_in_a_file_is_found(tmp_path):
    text = write_records(tmp_path / "t.jsonl", [*({"id": i} for i in range(3000)), "late"])
    assert list(Documents(text)) == ["late"]


# Data sets.


def test_a_data_set_is_read_only_as_far_as_it_is_needed(monkeypatch):
    asked, given = [], []

    def load_dataset(name, configuration, **options):
        asked.append((name, configuration, options))
        for number in range(10**9):
            given.append(number)
            yield {"text": f"{number} " * 20}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = read("owner/name:english")
    assert asked == [("owner/name", "english", {"split": "train", "streaming": True})]
    assert len(given) < 2000
    again = read("owner/name:english")
    assert torch.equal(text.calibration, again.calibration)
    read("owner/name")
    assert asked[-1][:2] == ("owner/name", None)


def test_a_data_set_that_fails_is_refused(monkeypatch):
    def breaks(*args, **options):
        yield {"text": "a"}
        raise ConnectionError("the hub is gone")

    monkeypatch.setattr(datasets, "load_dataset", breaks)
    with pytest.raises(FactorLLMError, match=r"owner/name is no local file.*the hub is gone"):
        read("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter(lambda: {"label": 1}, None))
    with pytest.raises(FactorLLMError, match="the keys label, none of text"):
        read("owner/name")
