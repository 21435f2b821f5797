"""Corpora, tokenization, packing and masking. numpy only: preparing a corpus needs no torch."""
