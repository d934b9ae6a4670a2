import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CONFIGS, relative_error, save_dense, some_tokens
from huggingface_hub.utils import filter_repo_objects

from factorllm.dense import open_model
from factorllm.dense.hub import download
from factorllm.text.documents import Documents

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
    assert [text.strip() for text in Documents(str(path))] == DOCUMENTS


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loaded_model_is_the_one_that_transformers_loads(name, tmp_path):
    config = CONFIGS[name]
    model = save_dense(config, tmp_path)
    loaded = open_model(str(tmp_path)).load_model(torch.float32, torch.device("cpu"))
    tokens = some_tokens(config)
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-6


def test_of_a_hub_model_named_chat_templates_are_fetched_and_no_other_folder(tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    names = ["config.json", "model.safetensors", "onnx/config.json", "additional_chat_templates/rag.jinja"]
    for name in names:
        (hub / name).parent.mkdir(parents=True, exist_ok=True)
        (hub / name).write_text("")

    def fetch(hub_id, **patterns):
        for name in filter_repo_objects(names, **patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    folder = download("me/tiny")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {*names} - {names[2]}


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
