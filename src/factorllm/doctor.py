"""What `factorllm doctor` finds: versions, the machine, and the engines that models can run in."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from factorllm.engines import ENGINES, installed
from factorllm.runs.memory import available_memory

_PACKAGES = (
    "factorllm", "torch", "transformers", "accelerate", "safetensors", "gguf", "datasets", "numpy", "scipy", "peft",
    "lm_eval", "xllamacpp",
)  # fmt: skip


def findings() -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} free",
        "GPU": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        **{f"engine {name}": "found" if installed(name) else "not found" for name in ENGINES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
