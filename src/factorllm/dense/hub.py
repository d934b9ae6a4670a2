"""Models of the Hugging Face hub, fetched into its own cache."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

from factorllm.errors import refusing
from factorllm.runs.output import TEMPLATES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of the weights, or else the index of several."""

_SMALL = ["*.json", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*"]


def download(hub_id: str) -> Path:
    """The local folder of a hub model. What is not there yet is fetched: of the weights, only the files that
    transformers would take, and nothing of subfolders but chat templates.

    Raises:
        FactorLLMError: when the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], ignored: str = "*/*") -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=[ignored]))

    with _given(hub_id):
        folder = fetch([*_SMALL, SINGLE])
        fetch([f"{TEMPLATES}/*.jinja"], ignored=f"{TEMPLATES}/*/*")
        if not (folder / SINGLE).exists() and (folder / INDEX).exists():
            shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            fetch(sorted(set(shards.values())))
    return folder


def download_config(hub_id: str) -> Path:
    """The local folder that holds at least the `config.json` of a hub model.

    Raises:
        FactorLLMError: when the hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    with _given(hub_id):
        return Path(hf_hub_download(hub_id, "config.json")).parent


def _given(hub_id: str) -> AbstractContextManager[None]:
    instead = "check the name and the network, or give a local folder or .gguf file"
    return refusing(f"no such model: {hub_id} is no local path, and the hub did not give it: it", instead)
