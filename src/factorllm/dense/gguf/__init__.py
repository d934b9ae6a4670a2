"""A dense model in a GGUF file: its config, its RoPE, its tokenizer and its tensors, as llama.cpp reads them."""
