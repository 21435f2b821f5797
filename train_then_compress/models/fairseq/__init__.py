"""The bridge to fairseq: weights both ways, its modules under our parameters, its published checkpoints."""
