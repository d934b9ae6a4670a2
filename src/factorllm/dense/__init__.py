"""A dense model, read lazily, tensor by tensor: from a folder of safetensors, a GGUF file, or the hub."""

import os
from pathlib import Path

from factorllm.dense.gguf.file import GGUFSource
from factorllm.dense.hub import download
from factorllm.dense.model import ModelSource
from factorllm.dense.safetensors import SafetensorsSource
from factorllm.errors import RENAME, FactorLLMError, check_utf8, refusing_path

__all__ = ["ModelSource", "is_hub_id", "local_path", "open_model"]


def local_path(model: str) -> Path:
    """A model's path on this machine, if it is one.

    Raises:
        FactorLLMError: for what no path can be: a name that is too long; for a folder whose path is no UTF-8.
    """
    with refusing_path(model):
        path = Path(os.path.expanduser(model))
        (path / "config.json").exists()
    if path.is_dir():
        check_utf8(path, RENAME)
    return path


def is_hub_id(model: str, path: Path) -> bool:
    """Whether a model is named as on the hub, `owner/name`, and is not on this machine.

    Args:
        path: of `local_path`.
    """
    is_path = path.exists() or path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~"))
    return not is_path and model.count("/") == 1


def open_model(model: str) -> ModelSource:
    """Open a dense model: the path of a folder or of a `.gguf` file, or a hub id `owner/name`.

    Raises:
        FactorLLMError: when there is no such model, it is damaged, or its family is not supported.
    """
    path = local_path(model)
    if path.is_dir():
        return SafetensorsSource(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFSource(path)
        raise FactorLLMError(f"{model} is a file, but not a .gguf; give a model folder, a .gguf file or a hub id")
    if not is_hub_id(model, path):
        raise FactorLLMError(f"no such model: {model} is neither a folder, a .gguf file nor a hub id (owner/name)")
    return SafetensorsSource(download(model), label=model)
