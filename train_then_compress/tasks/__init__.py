"""Tasks: what a model is trained and judged on, in the form that the training loop asks for."""
