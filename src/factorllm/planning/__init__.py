"""What a conversion would cost and give, before it starts: speed, size, memory, time and quality of each shape."""

TYPES = ("q8_0", "q4_0")
"""File types that are looked at unless others are asked for."""
