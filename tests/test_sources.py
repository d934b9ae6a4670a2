import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CONFIGS, byte_tokenizer, relative_error, save_dense, some_tokens

from factorllm.settings import Settings
from factorllm.sources import open_model, read_calibration_text
from factorllm.sources.text import pack, read_documents

DOCUMENTS = ["first document", "second one", "the third"]


def write(path, documents):
    records = [{"id": i, "text": text} for i, text in enumerate(documents)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents) + "\n\n\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps({r["id"]: {"title": "t", "extract": r["text"]} for r in records}))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_each_kind_of_file_gives_its_documents(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    write(path, DOCUMENTS)
    assert [text.strip() for text in read_documents(str(path))] == DOCUMENTS


def test_packing_puts_the_end_token_between_documents():
    tokenizer = byte_tokenizer()
    packed = pack(DOCUMENTS, tokenizer, 4, 8)
    flat = packed.flatten().tolist()
    first = tokenizer(DOCUMENTS[0], add_special_tokens=False).input_ids
    assert packed.shape == (4, 8)
    assert flat[: len(first) + 1] == [*first, tokenizer.eos_token_id]
    assert flat[len(first) + 1 :] == tokenizer(DOCUMENTS[1] + "</s>" + DOCUMENTS[2]).input_ids[: 32 - len(first) - 1]


def test_no_document_is_both_calibrated_on_and_held_out(tmp_path):
    path = tmp_path / "text.txt"
    write(path, [f"{i:04d}" * 5 for i in range(400)])
    tokenizer = byte_tokenizer()
    text = read_calibration_text(str(path), tokenizer, Settings(tokens=2000, held_out_tokens=400, length=40))
    assert text.calibration.shape == (50, 40)
    assert text.held_out.shape == (10, 40)
    seen = [set(tokenizer.decode(part.flatten()).split("</s>")) for part in (text.calibration, text.held_out)]
    assert not {d for d in seen[0] & seen[1] if len(d) == 20}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loaded_model_is_the_one_that_transformers_loads(name, tmp_path):
    config = CONFIGS[name]
    model = save_dense(config, tmp_path)
    loaded = open_model(str(tmp_path)).load_model(torch.float32, torch.device("cpu"))
    tokens = some_tokens(config)
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-6


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    save_dense(CONFIGS["mha"], tmp_path / "a")
    save_dense(CONFIGS["mha"], tmp_path / "b")
    save_dense(CONFIGS["mha"], tmp_path / "c", seed=1)
    prints = [open_model(str(tmp_path / name)).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_model_card_gives_the_licence(tmp_path):
    save_dense(CONFIGS["mha"], tmp_path)
    assert open_model(str(tmp_path)).licence is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert open_model(str(tmp_path)).licence == "mit"
