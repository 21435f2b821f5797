"""Watching a run: ``metrics.jsonl``, the progress display, Weights & Biases. Knows no torch."""
