"""Speed of models in one engine: measured in turns in one run, as medians and ratios."""
