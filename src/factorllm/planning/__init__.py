"""What a conversion would cost and give, before it starts: speed, size, memory, time and quality of each shape."""
