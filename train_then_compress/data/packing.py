"""RoBERTa's FULL-SENTENCES packing (Liu et al. 2019, section 4.2)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from train_then_compress.data.prepare import EOS, Prepared


def full_sentences(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cut a token stream into blocks of whole consecutive sentences; blocks may cross documents.

    Returns int64 ``[blocks, 2]``: start and end of each block, at most ``length - 1`` tokens (one place is left for
    ``<s>``). A sentence longer than that is cut. A document's separating ``</s>`` never begins a block.
    """
    room = length - 1
    is_end = np.asarray(tokens == EOS)
    ends = np.flatnonzero(is_end) + 1
    blocks = []
    start = 0
    while start < len(tokens):
        if is_end[start]:
            start += 1
            continue
        last = np.searchsorted(ends, start + room, side="right") - 1
        end = int(ends[last]) if last >= 0 and ends[last] > start else min(start + room, len(tokens))
        blocks.append((start, end))
        start = end
    return np.asarray(blocks, dtype=np.int64).reshape(-1, 2)


def packed(prepared: Prepared, split: str, length: int) -> np.ndarray:
    """The blocks of a split, computed once and kept beside the prepared corpus."""
    path = prepared.directory / f"blocks-{split}-{length}.npy"
    if not path.is_file():
        temporary = path.with_name(f".{path.stem}-{os.getpid()}.npy")
        np.save(temporary, full_sentences(prepared.tokens(split), length))
        Path(temporary).replace(path)
    blocks: np.ndarray = np.load(path, mmap_mode="r")
    return blocks
