"""What fairseq-train reads, is told, and says: a text as `fairseq-preprocess` leaves it, the command, its log."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train_then_compress.data.prepare import EOS, MASK, Prepared


def numbering(vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: fairseq's number of each token. Its masked LM puts ``<mask>`` behind all words."""
    numbers = np.arange(vocab_size)
    numbers[MASK + 1 :] -= 1
    numbers[MASK] = vocab_size - 1
    return numbers


def binarize(prepared: Prepared, directory: Path) -> None:
    """Write ``dict.txt`` and the training split, a sentence an item, as fairseq's masked LM reads them.

    The same tokens in the same order; a document's end is an item with ``</s>`` alone, as an empty line gives it.
    """
    from fairseq.data.indexed_dataset import MMapIndexedDataset, best_fitting_int_dtype

    symbols = "".join(f"token{number} 1\n" for number in range(MASK + 1, prepared.vocab_size))
    (directory / "dict.txt").write_text(symbols)
    dtype = best_fitting_int_dtype(prepared.vocab_size)
    tokens = numbering(prepared.vocab_size)[prepared.tokens("train")]
    ends = np.flatnonzero(tokens == EOS) + 1
    (directory / "train.bin").write_bytes(tokens[: ends[-1]].astype(dtype).tobytes())
    with MMapIndexedDataset.Index.writer(str(directory / "train.idx"), dtype) as index:
        index.write(np.diff(ends, prepend=0).tolist())


def command(data: Path, flags: list[str], settings: dict[str, Any]) -> list[str]:
    """The command of fairseq's user; it logs JSON."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fairseq_cli.train", str(data), *flags, *words, "--log-format", "json"]


def tokens_of(interval: int) -> Callable[[str], float | None]:
    """Reads the log: the tokens of so many updates, which are ``--log-interval``, or None for another line."""

    def read(line: str) -> float | None:
        _, found, stats = line.partition("| train_inner | ")
        return float(json.loads(stats)["wpb"]) * interval if found else None

    return read
