"""What decides the bytes of a result: a run that is the same goes on, or is done already."""

from __future__ import annotations

from importlib.metadata import version

from pydantic import BaseModel

from factorllm.text.calibration import text_identity


def common_identity(text: str | None, settings: BaseModel) -> dict:
    """What decides the bytes of a result beside models and recipes. A device is known by its kind."""
    values = settings.model_dump(mode="json")
    return {
        "text": text_identity(text),
        "settings": values | {"device": values["device"].partition(":")[0]},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the bytes of a result."""
    return {package: version(package) for package in ("factorllm", "torch", "transformers", "numpy", "POT")}
