"""What a conversion cost and what it gained: perplexity, agreement, tasks, parameters and FLOPs, speed."""
