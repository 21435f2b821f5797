"""RoBERTa in plain PyTorch, and the layers it is made of."""
