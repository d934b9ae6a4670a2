"""A smaller vocabulary: embeddings and output head of the tokens that are used, the rest of the model as it was."""

VOCABULARY = 32_768
"""Tokens that stay when nothing else is said."""

COUNTED_TOKENS = 10_000_000
"""How many are counted when nothing else is said; a million misses more than half of the rare ones."""
