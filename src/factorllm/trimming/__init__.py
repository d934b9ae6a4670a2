"""A smaller vocabulary: embeddings and output head of the tokens that are used, the rest of the model as it was."""
