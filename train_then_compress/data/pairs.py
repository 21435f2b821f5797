"""Sentence pairs as arrays of tokens on disk, split by group without leakage, and batches by a budget of tokens."""

from __future__ import annotations

import importlib.metadata
import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from train_then_compress.config import ConfigError
from train_then_compress.config.parallel import ParallelConfig
from train_then_compress.data.parallel import Pair, ParallelCorpus, load_parallel
from train_then_compress.data.prepare import (
    EOS,
    PAD,
    SPLITS,
    Tokenized,
    content_id,
    document_hash,
    once,
    train_tokenizer,
)
from train_then_compress.records import digest, what

HELD_OUT = 0.02
SCHEMA = 1
#: Held-out pairs are whole sentences, and no group gives more than a few.
_LEAST_WORDS, _MOST_OF_A_GROUP = 6, 15
#: A training pair that begins like a held-out one is too much like it.
_PREFIX = 60
#: Batches are made of neighbours in length among so many batches' worth of shuffled pairs.
_WINDOW = 100


@dataclass(frozen=True)
class PairSplit:
    """``tokens`` of all sentences in a row; side s of a pair ends at ``ends`` [pairs, 2]; without ``</s>``."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [pairs, 2], ``</s>`` of each side included."""
        return np.diff(self.ends.flatten(), prepend=0).reshape(-1, 2) + 1

    def sides(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of a pair."""
        start = self.ends[number - 1, 1] if number else 0
        middle, end = self.ends[number]
        return self.tokens[start:middle], self.tokens[middle:end]


@dataclass(frozen=True)
class Pairs(Tokenized):
    """A prepared parallel corpus; one tokenizer for both languages."""

    def split(self, name: str) -> PairSplit:
        """A split's pairs, in the order of their hashes."""
        with np.load(self.directory / f"{name}.npz") as arrays:
            return PairSplit(arrays["tokens"], arrays["ends"])

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """Sources and references of ``valid`` or ``test`` as text, in the order of `split`."""
        rows = json.loads((self.directory / f"{split}.json").read_text())
        return [row[0] for row in rows], [row[1] for row in rows]


def prepare_pairs(config: ParallelConfig, cache: Path) -> Pairs:
    """Fetch, filter, split, tokenize and store a parallel corpus, or return what already stands.

    Raises `ConfigError` for a corpus without pairs in a split.
    """
    corpus = load_parallel(config, cache)
    key = digest([what(config), corpus.sources, SCHEMA])[:16]
    directory = cache / "prepared" / key
    record = once(directory, lambda temporary: _build(config, corpus, temporary))
    return Pairs(directory, record["id"], record)


def _build(config: ParallelConfig, corpus: ParallelCorpus, directory: Path) -> dict[str, Any]:
    splits = split_pairs(config, corpus)
    for split, pairs in splits.items():
        if not pairs:
            raise ConfigError(f"data={config.name}: no pair fell into the {split} split "
                              f"({sum(map(len, splits.values()))} in all); give more, or files of its own")  # fmt: skip
    tokenizer = train_tokenizer((side for pair in splits["train"] for side in pair[:2]), config.vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    for split, pairs in splits.items():
        _write(directory / f"{split}.npz", pairs, tokenizer)
        if split != "train":
            (directory / f"{split}.json").write_text(json.dumps([pair[:2] for pair in pairs], ensure_ascii=False))
    names = ("tokenizer.json", *(f"{split}.npz" for split in SPLITS))
    return {
        "id": content_id(directory / name for name in names), "corpus": config.name,
        "vocab_size": tokenizer.get_vocab_size(), "sources": corpus.sources, "licence": corpus.licence,
        "splits": {split: {"pairs": len(pairs), "words": sum(len(pair.source.split()) for pair in pairs)}
                   for split, pairs in splits.items()},
        "tokenizers": importlib.metadata.version("tokenizers"),
    }  # fmt: skip


def split_pairs(config: ParallelConfig, corpus: ParallelCorpus) -> dict[str, list[Pair]]:
    """Each pair once, in one split; no training pair has a side, or the beginning of one, that is held out."""
    missing = [split for split in ("valid", "test") if split not in corpus.pairs]
    found: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    taken: dict[str, int] = defaultdict(int)
    for source, pairs in corpus.pairs.items():
        for pair in sorted({_clean(pair) for pair in pairs()}, key=lambda pair: document_hash("\t".join(pair[:2]))):
            if not _fits(config, pair):
                continue
            place = int(document_hash(pair.group) / 2**64 / HELD_OUT)
            if source != "train" or place >= len(missing):
                found[source].append(pair)
            elif len(pair.source.split()) >= _LEAST_WORDS and taken[pair.group] < _MOST_OF_A_GROUP:
                taken[pair.group] += 1
                found[missing[place]].append(pair)
    seen: set[str] = set()
    for split in ("valid", "test"):
        found[split] = [pair for pair in _unique(found[split]) if not seen & _marks(pair)]
        seen |= {mark for pair in found[split] for mark in _marks(pair)}
    found["train"] = [pair for pair in _unique(found["train"]) if not seen & _marks(pair)]
    return found


def normalized(text: str) -> str:
    """As all text of a parallel corpus is: composed characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _clean(pair: Pair) -> Pair:
    return Pair(normalized(pair.source), normalized(pair.target), pair.group)


def _fits(config: ParallelConfig, pair: Pair) -> bool:
    lengths = [len(side.split()) for side in pair[:2]]
    return (min(lengths) >= config.min_words and max(lengths) <= config.max_words
            and max(lengths) < config.max_ratio * min(lengths))  # fmt: skip


def _unique(pairs: list[Pair]) -> Iterator[Pair]:
    yield from {pair[:2]: pair for pair in reversed(pairs)}.values()


def _marks(pair: Pair) -> set[str]:
    """Both sides as they are compared, whole and their beginnings."""
    sides = ["".join(c for c in side.lower() if c.isalnum() or c == " ") for side in pair[:2]]
    whole = {f"{number} is {side}" for number, side in enumerate(sides)}
    return whole | {f"{number} begins {side[:_PREFIX]}" for number, side in enumerate(sides) if len(side) > _PREFIX}


def _write(path: Path, pairs: list[Pair], tokenizer: Tokenizer) -> None:
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast([side for pair in pairs for side in pair[:2]])]
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    np.savez(
        path, tokens=np.array([token for ids in encoded for token in ids], dtype=dtype),
        ends=np.cumsum([len(ids) for ids in encoded], dtype=np.int64).reshape(-1, 2),
    )  # fmt: skip


@dataclass(frozen=True)
class PairBatch:
    """``source`` int64 [pairs, length], ``</s>`` after each sentence, then padding; ``target``: what the decoder reads
    (``</s>`` first, as in fairseq); ``labels``: what it is to say (``</s>`` last); both [pairs, length]."""

    source: np.ndarray
    target: np.ndarray
    labels: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The source."""
        return self.source


def batch_of(split: PairSplit, numbers: np.ndarray) -> PairBatch:
    """These pairs, each side padded to its longest."""
    longest = split.lengths[numbers].max(axis=0)
    source, target, labels = (np.full((len(numbers), size), PAD, dtype=np.int64) for size in (*longest, longest[1]))
    for row, number in enumerate(numbers):
        one, other = split.sides(int(number))
        source[row, : len(one)], source[row, len(one)] = one, EOS
        target[row, 0], target[row, 1 : len(other) + 1] = EOS, other
        labels[row, : len(other)], labels[row, len(other)] = other, EOS
    return PairBatch(source, target, labels)


class PairBatches:
    """Endless batches of at most ``tokens`` source and target positions, padding included; that of a step depends on
    (seed, step) only, and every pair is seen once an epoch.

    Pairs are shuffled, sorted by length within windows, cut into batches, and the batches shuffled again: neighbours
    in length share a batch, so that little of it is padding.
    """

    def __init__(self, split: PairSplit, tokens: int, seed: int):
        longest = int(split.lengths.sum(axis=1).max())
        if longest > tokens:
            raise ConfigError(f"optimizer.batch_tokens={tokens}: the longest pair alone has {longest} tokens")
        self.split, self.tokens, self.seed = split, tokens, seed
        self._epoch = lru_cache(maxsize=2)(self._cut)
        self._starts = [0]

    def _cut(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch, 3])
        order = rng.permutation(len(self.split))
        lengths = self.split.lengths
        window = max(1, _WINDOW * self.tokens * len(order) // int(lengths.sum()))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), window):
            numbers = order[start : start + window]
            numbers = numbers[np.lexsort((lengths[numbers, 0], lengths[numbers, 1]))]
            batches += self._fill(numbers, lengths[numbers])
        return [batches[place] for place in rng.permutation(len(batches))]

    def _fill(self, numbers: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        start, longest = 0, np.zeros(2, dtype=np.int64)
        for place, size in enumerate(lengths):
            longer = np.maximum(longest, size)
            if (place - start + 1) * int(longer.sum()) > self.tokens:
                yield numbers[start:place]
                start, longer = place, size
            longest = longer
        yield numbers[start:]

    def __call__(self, step: int) -> PairBatch:
        """The batch of a step."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return batch_of(self.split, self._epoch(epoch)[step - self._starts[epoch]])
