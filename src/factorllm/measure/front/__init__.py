"""Students beside all that quantisation alone gives: file size, speed and quality of every model in every type."""
