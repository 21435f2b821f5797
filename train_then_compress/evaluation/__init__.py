"""How good a model is: loss, perplexity and masked-token accuracy."""
