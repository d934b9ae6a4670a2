"""One GGUF file from a checkpoint, for llama.cpp and what is built on it."""

from factorllm.exporting.gguf_file import FILE_TYPES, Exported, export_gguf

__all__ = ["FILE_TYPES", "Exported", "export_gguf"]
