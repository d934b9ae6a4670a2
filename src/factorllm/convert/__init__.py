"""From a dense model to a sparse one, layer by layer."""
