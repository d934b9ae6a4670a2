import math
import shutil

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from transformers import AddedToken

from factorllm.dense import open_model
from factorllm.errors import FactorLLMError
from factorllm.runs.settings import Settings
from factorllm.text import sample as module
from factorllm.text.documents import Documents
from factorllm.text.sample import sample
from factorllm.text.sampling import BATCH, chat_opening, sample_from_model, start_token

SETTINGS = Settings(tokens=2 * BATCH * 32, length=32)


@pytest.mark.parametrize(("temperature", "opening"), [(1.0, None), (0.5, None), (1.0, [7, 42, 99])])
def test_tokens_are_drawn_as_the_model_says(dense_folder, temperature, opening):
    source = open_model(str(dense_folder))
    model, tokenizer = source.load_model(torch.float32, torch.device("cpu")), source.tokenizer()
    drawn = sample_from_model(model, tokenizer, 8192, 2, seed=3, temperature=temperature, opening=opening)
    logits = model(torch.tensor([opening or [start_token(tokenizer)]])).logits[0, -1]
    wanted = 8192 * (logits.double() / temperature).softmax(-1)
    found = torch.bincount(drawn[:, 0], minlength=len(wanted))
    assert ((found - wanted).abs() < 5 * wanted.sqrt() + 5).all()
    assert wanted.max() > 2 * wanted.min()  # so a uniform draw would not pass


def test_the_head_is_given_a_block_of_memory(dense_folder, monkeypatch):
    """Of a slice torch may copy the head for each sequence, and without room lose its fast products for good."""
    source = open_model(str(dense_folder))
    model, given = source.load_model(torch.float32, torch.device("cpu")), []
    compute = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: given.append(x.is_contiguous()) or compute(x))
    sample_from_model(model, source.tokenizer(), 4, 3, seed=3, opening=[7, 42, 99])
    assert given == [True] * 3


def test_a_document_begins_after_the_token_between_documents():
    tokenizer = byte_tokenizer()
    assert start_token(tokenizer) in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokenizer.add_tokens("<|endoftext|>")
    assert start_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_tokenizer_without_such_a_token_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(FactorLLMError, match="no token to begin a document with"):
        start_token(tokenizer)


def test_conversations_begin_as_the_chat_template_says(dense_folder, tmp_path):
    path = sample(str(dense_folder), tmp_path / "chat.jsonl", chat=True, settings=SETTINGS)
    documents = list(Documents(str(path)))
    assert len(documents) == SETTINGS.tokens // SETTINGS.length
    assert all(document.startswith("<s>user: ") for document in documents)
    assert len(set(documents)) == len(documents)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0]['content'] }}", "nothing before"),
        ("hello", "nothing before"),
        ("{{ raise_exception('tools only') }}", r"cannot be used \(tools only\); leave --chat out"),
        ({"tool_use": "{{ tools }}"}, r"cannot be used \(.*no default.*; leave --chat out"),
    ],
)
def test_a_tokenizer_without_a_beginning_of_conversations_is_refused(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(FactorLLMError, match=message):
        chat_opening(tokenizer)


def test_a_document_ends_at_each_token_that_is_no_text():
    """As letters, which they would be read as, the model did not say them."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(AddedToken("<filename>", special=True))
    named = tokenizer.convert_tokens_to_ids("<filename>")
    assert named not in tokenizer.all_special_ids  # only those are that have a role in its config
    said = [tokenizer(letter * 16).input_ids for letter in "abc"]
    tokens = [*said[0], named, *said[1], tokenizer.eos_token_id, *said[2]]
    assert list(module._documents(tokens, tokenizer)) == ["a" * 16, "b" * 16, "c" * 16]


@pytest.mark.parametrize("length", [15, 32])
def test_no_empty_file_is_written_for_text(length, dense_folder, tmp_path, monkeypatch):
    """Documents of fewer than 16 tokens are left out, and there may be no others."""
    monkeypatch.setattr(module, "sample_from_model", lambda *given: torch.full(given[2:4], 257))  # end tokens
    with pytest.raises(FactorLLMError, match=rf"in sequences of {length} tokens the model says no document of at"):
        sample(str(dense_folder), tmp_path / "text.jsonl", settings=Settings(tokens=64, length=length))
    assert not list(tmp_path.iterdir())


def test_refused_conversations_leave_nothing_behind(dense_folder, tmp_path):
    dumb = shutil.copytree(dense_folder, tmp_path / "dumb")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (dumb / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(dumb)
    with pytest.raises(FactorLLMError, match="no chat template"):
        sample(str(dumb), tmp_path / "chat.jsonl", chat=True, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["dumb"]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(dense_folder, tmp_path, monkeypatch):
    whole = sample(str(dense_folder), tmp_path / "whole.jsonl", settings=SETTINGS)
    assert len(list(Documents(str(whole)))) > BATCH

    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return sample_from_model(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_from_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(str(dense_folder), tmp_path / "again.jsonl", settings=SETTINGS)
    assert not (tmp_path / "again.jsonl").exists()
    again = sample(str(dense_folder), tmp_path / "again.jsonl", settings=SETTINGS)
    assert again.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl", "whole.jsonl"]


def test_numbers_may_be_those_of_numpy(dense_folder, tmp_path):
    made = [
        sample(
            dense_folder, tmp_path / "text.jsonl", temperature=temperature, chat=chat, settings=SETTINGS
        ).read_bytes()
        for temperature, chat in ((np.float32(0.5), np.bool_(False)), (0.5, False))
    ]
    assert made[0] == made[1]


def test_refusals(dense_folder, tmp_path):
    with pytest.raises(FactorLLMError, match=r"no \.jsonl file"):
        sample(str(dense_folder), tmp_path / "text.txt", settings=SETTINGS)
    for temperature in (0, math.nan, math.inf):
        with pytest.raises(FactorLLMError, match=f"temperature of {temperature} draws nothing"):
            sample(str(dense_folder), tmp_path / "text.jsonl", temperature=temperature, settings=SETTINGS)
    (tmp_path / "text.jsonl").write_text("mine")
    with pytest.raises(FactorLLMError, match="exists already"):
        sample(str(dense_folder), tmp_path / "text.jsonl", settings=SETTINGS)
    assert (tmp_path / "text.jsonl").read_text() == "mine"
