"""The files that ``fairseq-preprocess --dataset-impl mmap`` makes (fairseq 0.12), read and written without fairseq.

``PREFIX.bin`` has the tokens of all sentences in a row, ``</s>`` after each. ``PREFIX.idx`` has a header (magic,
version, a code for the tokens' type, number of sentences), then each sentence's length (int32) and first byte (int64).
``dict.txt`` has a symbol and its count a line; ids count from 4, after `SPECIAL`, which are not listed.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train_then_compress.data.prepare import EOS, SPECIAL_TOKENS, UNK

#: fairseq's ids 0 to 3, and ours: ``<s>``, ``<pad>``, ``</s>``, ``<unk>``.
SPECIAL = SPECIAL_TOKENS[: UNK + 1]
_HEADER = struct.Struct("<9sQBQ")
_MAGIC = b"MMIDIDX\x00\x00"
_TYPES: dict[int, type] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    """``tokens`` of all sentences in a row, memory-mapped; sentence s ends, with its ``</s>``, at ``ends[s]``."""

    tokens: np.ndarray
    ends: np.ndarray

    @classmethod
    def read(cls, prefix: Path) -> Sentences:
        """``PREFIX.bin`` and ``PREFIX.idx``; raises `ValueError` for another format and damaged files."""
        data, index = (prefix.with_name(f"{prefix.name}.{end}") for end in ("bin", "idx"))
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise ValueError(f"{index.name} is not of fairseq-preprocess --dataset-impl mmap, its default")
            _, version, code, count = _HEADER.unpack(header)
            if version != 1 or code not in _TYPES:
                raise ValueError(f"{index.name} is of version {version} and type {code}: unknown here")
            is_whole = index.stat().st_size == _HEADER.size + 12 * count
            lengths = np.fromfile(file, np.int32, count if is_whole else 0)
            starts = np.fromfile(file, np.int64)
        ends, size = np.cumsum(lengths, dtype=np.int64), np.dtype(_TYPES[code]).itemsize
        has_its_tokens = data.stat().st_size == int(lengths.sum(dtype=np.int64)) * size
        if not is_whole or not has_its_tokens or (starts != (ends - lengths) * size).any():
            raise ValueError(f"{data.name} and {index.name} do not fit together: one of them is damaged")
        tokens = np.memmap(data, _TYPES[code], mode="r") if len(ends) else np.empty(0, _TYPES[code])
        return cls(np.asarray(tokens), ends)

    def check(self, name: str, vocab_size: int) -> None:
        """Raise `ValueError` for a sentence without ``</s>`` and an id that is not in the dictionary."""
        lengths = np.diff(self.ends, prepend=0)
        if (lengths == 0).any() or (self.tokens[self.ends - 1] != EOS).any():
            number = int(np.argmax((lengths == 0) | (self.tokens[self.ends - 1] != EOS)))
            raise ValueError(f"{name}: sentence {number + 1} does not end with </s>")
        if len(self.tokens) and (self.tokens.max() >= vocab_size or self.tokens.min() < 0):
            raise ValueError(f"{name}: token {self.tokens.max()} is not in the dictionary of {vocab_size}")


def write_sentences(prefix: Path, sentences: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """``PREFIX.bin`` and ``PREFIX.idx``; each sentence ends with ``</s>``."""
    lengths = array("i")
    with prefix.with_name(f"{prefix.name}.bin").open("wb") as file:
        for sentence in sentences:
            file.write(sentence.astype(dtype, copy=False).tobytes())
            lengths.append(len(sentence))
    code = next(code for code, kind in _TYPES.items() if kind == dtype)
    sizes = np.array(lengths, dtype=np.int32)
    starts = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    with prefix.with_name(f"{prefix.name}.idx").open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(sizes)) + sizes.tobytes() + starts.tobytes())


def read_dictionary(path: Path) -> list[str]:
    """The symbol of each id, special ones first; raises `ValueError` for a line that is not ``SYMBOL COUNT``."""
    symbols = dict.fromkeys(SPECIAL)
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            symbol, _, count = line.rstrip().rpartition(" ")
            if not symbol or not count.isdecimal() or symbol in symbols:
                raise ValueError(f"{path.name}: line {number} is not a new symbol and its count")
            symbols[symbol] = None
    return list(symbols)


def write_dictionary(path: Path, symbols: list[str], counts: np.ndarray) -> None:
    """The symbols of all ids but the special ones, with how often each occurs."""
    lines = (f"{symbol} {count}\n" for symbol, count in list(zip(symbols, counts, strict=True))[len(SPECIAL) :])
    path.write_text("".join(lines), encoding="utf-8")
