"""One command from a wish to a model that can be used: every step of the way, planned in a file."""
