"""One GGUF file from a checkpoint, for llama.cpp and what is built on it."""

from factorllm.exporting.gguf_file import Exported, export_gguf
from factorllm.exporting.plan import FILE_TYPES

__all__ = ["FILE_TYPES", "Exported", "export_gguf"]
