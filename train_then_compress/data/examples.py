"""Labelled text as arrays of tokens on disk, split by group without leakage, and the batches made of it."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from train_then_compress.config import ConfigError, LabelledConfig
from train_then_compress.data.labelled import Example, LabelledCorpus, load_labelled
from train_then_compress.data.neighbours import Neighbours
from train_then_compress.data.prepare import (
    BOS,
    EOS,
    PAD,
    SPLITS,
    Tokenized,
    content_id,
    document_hash,
    encode_texts,
    once,
)
from train_then_compress.records import digest, what

HELD_OUT = 0.1
SCHEMA = 1
#: Batches are padded to multiples of this: each new shape costs milliseconds of kernel compilation (oneDNN).
_COLUMNS = 16
#: Batches are made of neighbours in length among so many batches' worth of shuffled examples.
_WINDOW = 10


@dataclass(frozen=True)
class Split:
    """``tokens`` of all texts in a row; text i of an example ends at ``ends`` [examples, 2] (equal: no second text);
    ``labels`` int64 [examples]."""

    tokens: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples]: tokens of both texts, special ones left out."""
        return np.diff(self.ends[:, 1], prepend=0)

    def row(self, number: int, length: int) -> np.ndarray:
        """An example's ids, RoBERTa's form (Liu et al. 2019, section 3): ``<s> a </s>`` or ``<s> a </s></s> b </s>``.

        What does not fit into ``length`` is cut off the end of the longer text, down to half of the room each.
        """
        start = self.ends[number - 1, 1] if number else 0
        middle, end = self.ends[number]
        first, second = self.tokens[start:middle], self.tokens[middle:end]
        if not len(second):
            return np.concatenate([[BOS], first[: length - 2], [EOS]])
        room = length - 4
        shorter = min(len(first), len(second), room // 2)
        kept = shorter if len(first) <= len(second) else min(len(first), room - shorter)
        return np.concatenate([[BOS], first[:kept], [EOS, EOS], second[: room - kept], [EOS]])


@dataclass(frozen=True)
class Labelled(Tokenized):
    """A prepared labelled corpus."""

    @property
    def labels(self) -> list[str]:
        """The labels' names, in the order of their numbers."""
        return list(self.record["labels"])

    def split(self, name: str) -> Split:
        """A split's examples, in the order of their hashes."""
        with np.load(self.directory / f"{name}.npz") as arrays:
            return Split(arrays["tokens"], arrays["ends"], arrays["labels"])


def prepare_labelled(config: LabelledConfig, tokenizer: Path, cache: Path) -> Labelled:
    """Fetch, split, tokenize and store a labelled corpus, or return what already stands.

    Raises `ConfigError` for a corpus without examples in a split or with fewer than two labels.
    """
    corpus = load_labelled(config, cache)
    settings = {key: value for key, value in what(config).items() if key != "sequence_length"}
    key = digest([settings, corpus.sources, content_id([tokenizer]), SCHEMA])[:16]
    directory = cache / "prepared" / key
    record = once(directory, lambda temporary: _build(config, corpus, tokenizer, temporary))
    return Labelled(directory, record["id"], record)


def _build(config: LabelledConfig, corpus: LabelledCorpus, tokenizer: Path, directory: Path) -> dict[str, Any]:
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example, split in _assigned(corpus):
        splits[split].append(example)
    labels = sorted({example.label for example in splits["train"]})
    _check(config, splits, labels)
    (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    encoder = Tokenizer.from_file(str(tokenizer))
    for split, examples in splits.items():
        examples.sort(key=lambda example: (document_hash(example.text), example.pair or ""))
        _write(directory / f"{split}.npz", examples, labels, encoder)
    counts = {split: Counter(example.label for example in examples) for split, examples in splits.items()}
    majority = counts["train"].most_common(1)[0][0]
    return {
        "id": content_id(directory / name for name in ("tokenizer.json", *(f"{split}.npz" for split in SPLITS))),
        "corpus": config.name, "labels": labels, "vocab_size": encoder.get_vocab_size(),
        "splits": {split: {"examples": count.total(), "labels": dict(sorted(count.items()))}
                   for split, count in counts.items()},
        "majority_accuracy": {split: counts[split][majority] / counts[split].total() for split in ("valid", "test")},
        "sources": corpus.sources, "licence": corpus.licence, "tokenizers": importlib.metadata.version("tokenizers"),
    }  # fmt: skip


def _assigned(corpus: LabelledCorpus) -> Iterator[tuple[Example, str]]:
    """Each example once, with its split; of equal texts the first is kept, held-out before training."""
    missing = [split for split in ("valid", "test") if split not in corpus.examples]
    found: dict[str, list[Example]] = {split: [] for split in ("valid", "test", "train")}
    for source in found:
        for example in corpus.examples[source]() if source in corpus.examples else ():
            place = int(document_hash(example.group) / 2**64 / HELD_OUT)
            split = missing[place] if source == "train" and place < len(missing) else source
            found[split].append(example)
    seen: set[tuple[str, str]] = set()
    for split, examples in found.items():
        for example in examples:
            identity = (_normal(example.text), _normal(example.pair or ""))
            if identity not in seen and identity[0]:
                seen.add(identity)
                yield example, split


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _check(config: LabelledConfig, splits: dict[str, list[Example]], labels: list[str]) -> None:
    if len(labels) < 2:
        raise ConfigError(f"data={config.name}: two labels or more are needed; the training split has {labels}")
    for split, examples in splits.items():
        if not examples:
            raise ConfigError(
                f"data={config.name}: no example fell into the {split} split "
                f"({sum(map(len, splits.values()))} in all); give more, or files of its own (data.valid, data.test)"
            )
        unknown = sorted({example.label for example in examples} - set(labels))
        if unknown:
            raise ConfigError(f"data={config.name}: labels of the {split} split that training never shows: {unknown}")


def _write(path: Path, examples: list[Example], labels: list[str], encoder: Tokenizer) -> None:
    encoded = encode_texts(encoder, [text for example in examples for text in (example.text, example.pair or "")])
    dtype = np.uint16 if encoder.get_vocab_size() <= 2**16 else np.uint32
    numbers = {label: number for number, label in enumerate(labels)}
    np.savez(
        path, tokens=np.array([token for ids in encoded for token in ids], dtype=dtype),
        ends=np.cumsum([len(ids) for ids in encoded], dtype=np.int64).reshape(-1, 2),
        labels=np.array([numbers[example.label] for example in examples], dtype=np.int64),
    )  # fmt: skip


@dataclass(frozen=True)
class LabelledBatch:
    """``tokens`` int64 [examples, length], padded at the end; ``labels`` int64 [examples]."""

    tokens: np.ndarray
    labels: np.ndarray


def batch_of(split: Split, numbers: np.ndarray, length: int) -> LabelledBatch:
    """These examples, padded to the longest of them and on to a multiple of 16, at most ``length``."""
    rows = [split.row(int(number), length) for number in numbers]
    longest = max(map(len, rows))
    tokens = np.full((len(rows), min(length, longest + -longest % _COLUMNS)), PAD, dtype=np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return LabelledBatch(tokens, split.labels[numbers])


class LabelledBatches:
    """Endless batches of a split, as `Neighbours` has them."""

    def __init__(self, split: Split, batch_size: int, length: int, seed: int):
        self.split, self.length = split, length
        self._numbers = Neighbours(split.lengths, batch_size, _WINDOW, seed, kind=2)

    def __call__(self, step: int) -> LabelledBatch:
        """The batch of a step."""
        return batch_of(self.split, self._numbers(step), self.length)
