"""Train large, then compress: Transformers of many sizes under one budget, compressed, and compared by cost."""

__version__ = "0.1.0"
