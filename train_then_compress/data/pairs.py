"""Sentence pairs as arrays of tokens on disk, split by group without leakage, and batches by a budget of tokens."""

from __future__ import annotations

import importlib.metadata
import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from train_then_compress.config import ConfigError
from train_then_compress.config.parallel import ParallelConfig, ParallelText
from train_then_compress.data.parallel import Pair, ParallelCorpus, TokenizedCorpus, load_parallel
from train_then_compress.data.prepare import (
    EOS,
    PAD,
    SPLITS,
    Tokenized,
    content_id,
    document_hash,
    encode_texts,
    once,
    train_tokenizer,
)
from train_then_compress.records import digest, what

HELD_OUT = 0.02
SCHEMA = 2
#: Held-out pairs are whole sentences, and no group gives more than a few.
_LEAST_WORDS, _MOST_OF_A_GROUP = 6, 15
_SENTENCE_END = re.compile(r"[.!?…]['\"”’»)\]]*$")
_WORD = re.compile(r"[^\W_]+")
#: A training pair that begins like a held-out one is too much like it.
_PREFIX = 60
#: Batches are made of neighbours in length among so many batches' worth of shuffled pairs: 2.4 % of 4,096 positions are
#: then padding on debian_en_it (among 100: 9.5 %).
_WINDOW = 1000
#: Of pairs in a batch, where it holds so many, as in fairseq: on a CPU, bf16 multiplications are compiled for each
#: number of positions, and an epoch has a third as many of these.
_MULTIPLE = 8
_PAIRS_AT_ONCE = 10_000
_Sides = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]


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

    @property
    def languages(self) -> tuple[str, str]:
        """Codes of source and target."""
        source, target = self.record["languages"]
        return source, target

    def split(self, name: str) -> PairSplit:
        """A split's pairs, memory-mapped."""
        tokens = np.memmap(self.directory / f"{name}.tokens", _dtype(self.vocab_size), mode="r")
        ends = np.load(self.directory / f"{name}.npy", mmap_mode="r")
        return PairSplit(np.asarray(tokens), np.asarray(ends))

    def texts(self, split: str) -> tuple[list[str], list[str]]:
        """Sources and references of ``valid`` or ``test`` as text, in the order of `split`."""
        rows = json.loads((self.directory / f"{split}.json").read_text())
        return [row[0] for row in rows], [row[1] for row in rows]

    def copies(self, split: str) -> list[str]:
        """What a model would say that copies its sources: the baseline of every score."""
        pairs, tokenizer = self.split(split), Tokenizer.from_file(str(self.tokenizer))
        decoded = tokenizer.decode_batch([pairs.sides(number)[0].tolist() for number in range(len(pairs))])
        return [normalized(text) for text in decoded]


def prepare_pairs(config: ParallelConfig, cache: Path) -> Pairs:
    """Fetch, filter, split, tokenize and store a parallel corpus, or return what already stands.

    Meanwhile a training pair takes about 120 bytes of memory, whatever its length (40 million: 5 GB). Raises
    `ConfigError` for a corpus without pairs in a split.
    """
    corpus = load_parallel(config, cache)
    key = digest([what(config), corpus.sources, SCHEMA])[:16]
    directory = cache / "prepared" / key
    record = once(directory, lambda temporary: _build(config, corpus, temporary))
    return Pairs(directory, record["id"], record)


def _build(config: ParallelConfig, corpus: ParallelCorpus | TokenizedCorpus, directory: Path) -> dict[str, Any]:
    if isinstance(corpus, TokenizedCorpus):
        tokenizer, texts = corpus.tokenizer, {split: corpus.texts(split) for split in ("valid", "test")}
        tokens: dict[str, Iterable[_Sides]] = {split: corpus.tokens[split]() for split in SPLITS}
    else:
        assert isinstance(config, ParallelText)
        held_out, training = split_pairs(config, corpus)
        tokenizer = train_tokenizer((side for pair in training() for side in pair[:2]), config.vocab_size)
        texts = {split: [pair[:2] for pair in pairs] for split, pairs in held_out.items()}
        tokens = {split: _encode(tokenizer, pairs) for split, pairs in (*held_out.items(), ("train", training()))}
    tokenizer.save(str(directory / "tokenizer.json"))
    counts = {}
    for split in SPLITS:
        counts[split] = _write(directory, split, tokens[split], _dtype(tokenizer.get_vocab_size()))
        if not counts[split]["pairs"]:
            raise ConfigError(f"data={config.name}: no pair fell into the {split} split; give more pairs")
    for split, rows in texts.items():
        (directory / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
    names = ("tokenizer.json", *(f"{split}.{end}" for split in SPLITS for end in ("tokens", "npy")))
    return {
        "id": content_id(directory / name for name in names), "corpus": config.name, "splits": counts,
        "languages": [config.source, config.target],
        "vocab_size": tokenizer.get_vocab_size(), "sources": corpus.sources, "licence": corpus.licence,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }  # fmt: skip


def split_pairs(
    config: ParallelText, corpus: ParallelCorpus
) -> tuple[dict[str, list[Pair]], Callable[[], Iterator[Pair]]]:
    """The pairs of ``valid`` and ``test``, and what gives those of ``train``: each once, none with a side, or the
    beginning of one, that is held out.

    A split that the corpus has is taken whole, but for pairs with an empty side, and in its order: others score by it,
    too. One that is missing is made of a few sentences of the groups that fall to it; nothing of these is trained on.
    """
    missing = [split for split in ("valid", "test") if split not in corpus.pairs]
    held_out = {split: [pair for pair in map(_clean, pairs()) if pair.source and pair.target]
                for split, pairs in corpus.pairs.items() if split != "train"}  # fmt: skip
    marks = {mark for pairs in held_out.values() for pair in pairs for mark in _marks(pair)}
    for split, pairs in _pick(config, corpus, missing).items():
        held_out[split] = [pair for pair in pairs if marks.isdisjoint(_marks(pair))]
        marks |= {mark for pair in held_out[split] for mark in _marks(pair)}

    def training() -> Iterator[Pair]:
        """What is left to train on, in the corpus's order."""
        known: set[int] = set()
        for pair in map(_clean, corpus.pairs["train"]()):
            number = _number(pair)
            if (number not in known and _fits(config, pair) and _place(pair) >= len(missing)
                    and marks.isdisjoint(_marks(pair))):  # fmt: skip
                known.add(number)
                yield pair

    return held_out, training


def _pick(config: ParallelText, corpus: ParallelCorpus, splits: list[str]) -> dict[str, list[Pair]]:
    """For each split, sentences of the groups whose hash falls to it, in the order of their own hashes."""
    picked: dict[str, list[Pair]] = {split: [] for split in splits}
    if not splits:
        return picked
    candidates = {pair for pair in map(_clean, corpus.pairs["train"]()) if _place(pair) < len(splits)}
    unique = {pair[:2]: pair for pair in sorted(candidates) if _fits(config, pair) and _is_sentence(corpus, pair)}
    taken: Counter[str] = Counter()
    for pair in sorted(unique.values(), key=_number):
        if taken[pair.group] < _MOST_OF_A_GROUP:
            taken[pair.group] += 1
            picked[splits[_place(pair)]].append(pair)
    return picked


def normalized(text: str) -> str:
    """As all text of a parallel corpus is: composed characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _clean(pair: Pair) -> Pair:
    return Pair(normalized(pair.source), normalized(pair.target), pair.group)


def _number(pair: Pair) -> int:
    return document_hash("\t".join(pair[:2]))


def _place(pair: Pair) -> int:
    """0 and 1 for 2 % of the groups each."""
    return int(document_hash(pair.group) / 2**64 / HELD_OUT)


def _fits(config: ParallelText, pair: Pair) -> bool:
    lengths = [len(side.split()) for side in pair[:2]]
    return (min(lengths) >= config.min_words and max(lengths) <= config.max_words
            and max(lengths) < config.max_ratio * min(lengths))  # fmt: skip


def _is_sentence(corpus: ParallelCorpus, pair: Pair) -> bool:
    ends = not corpus.punctuated or all(_SENTENCE_END.search(side) for side in pair[:2])
    return ends and len(pair.source.split()) >= _LEAST_WORDS


def _marks(pair: Pair) -> set[str]:
    """Both sides as they are compared, words only, whole and their beginnings."""
    sides = [" ".join(_WORD.findall(side.lower())) for side in pair[:2]]
    whole = {f"{number} is {side}" for number, side in enumerate(sides)}
    return whole | {f"{number} begins {side[:_PREFIX]}" for number, side in enumerate(sides) if len(side) >= _PREFIX}


def _encode(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> Iterator[_Sides]:
    stream = iter(pairs)
    while batch := list(islice(stream, _PAIRS_AT_ONCE)):
        encoded = iter(encode_texts(tokenizer, [side for pair in batch for side in pair[:2]]))
        yield from zip(encoded, encoded, strict=True)


def _dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _write(directory: Path, split: str, pairs: Iterable[_Sides], dtype: type) -> dict[str, int]:
    lengths = array("q")
    with (directory / f"{split}.tokens").open("wb") as file:
        for sides in pairs:
            for ids in sides:
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                lengths.append(len(ids))
    ends = np.cumsum(np.array(lengths, dtype=np.int64)).reshape(-1, 2)
    np.save(directory / f"{split}.npy", ends)
    return {"pairs": len(ends), "tokens": sum(lengths)}


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
    pairs = [split.sides(int(number)) for number in numbers]
    longest = [1 + max(map(len, side)) for side in zip(*pairs, strict=True)]
    source, target, labels = (np.full((len(pairs), size), PAD, dtype=np.int64) for size in (*longest, longest[1]))
    for row, (one, other) in enumerate(pairs):
        source[row, : len(one)], source[row, len(one)] = one, EOS
        target[row, 0], target[row, 1 : len(other) + 1] = EOS, other
        labels[row, : len(other)], labels[row, len(other)] = other, EOS
    return PairBatch(source, target, labels)


class PairBatches:
    """Endless batches of at most ``tokens`` source and target positions, padding included; that of a step depends on
    (seed, step) only, and every pair is seen once an epoch.

    Pairs are shuffled, sorted by length within windows, cut into batches, of a multiple of 8 pairs where there is room
    for 8, and the batches shuffled again: neighbours in length share a batch, so that little of it is padding.
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
        start = 0
        while start < len(numbers):
            longest = np.maximum.accumulate(lengths[start : start + self.tokens // 2]).sum(axis=1)
            fitting = int(np.searchsorted(longest * np.arange(1, len(longest) + 1), self.tokens, side="right"))
            end = start + fitting
            if end < len(numbers) and fitting > _MULTIPLE:
                end -= fitting % _MULTIPLE
            yield numbers[start:end]
            start = end

    def __call__(self, step: int) -> PairBatch:
        """The batch of a step."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return batch_of(self.split, self._epoch(epoch)[step - self._starts[epoch]])
