"""Tasks that are chains of questions: later ones hold earlier answers, and what leads nowhere is pruned."""
