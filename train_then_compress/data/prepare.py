"""From a corpus to token arrays on disk: split by document, byte-level BPE, one memory-mapped array per split.

A prepared corpus lives in ``<cache>/prepared/<key>/``, keyed by a hash of what went in; its ``id`` is a hash of what
came out, and is the parent of every training stage's identity.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train_then_compress.config import BATCH_FIELDS, ConfigError, CorpusConfig
from train_then_compress.data.corpora import Corpus, load_corpus
from train_then_compress.records import digest, read_json, what, write_json

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BOS, PAD, EOS, UNK, MASK = range(5)
SPLITS = ("train", "valid", "test")
HELD_OUT = 0.02
SCHEMA = 1

# Ends at . ! or ?, with closing quotes or brackets, where a capital, digit or opening quote follows.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]”’]))\s+(?=["'(\[“‘]?[A-Z0-9])""")
_DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Tokenized:
    """A corpus that was tokenized and stored: its directory, the hash of its content, and its record."""

    directory: Path
    id: str
    record: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        """The file of the byte-level BPE."""
        return self.directory / "tokenizer.json"

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included (at most what was asked for)."""
        return int(self.record["vocab_size"])


@dataclass(frozen=True)
class Prepared(Tokenized):
    """A prepared text."""

    def tokens(self, split: str) -> np.ndarray:
        """Token ids of a split, ``</s>`` after each sentence and once more after each document; memory-mapped."""
        tokens: np.ndarray = np.load(self.directory / f"{split}.npy", mmap_mode="r")
        return tokens


def prepare(config: CorpusConfig, cache: Path) -> Prepared:
    """Fetch, split, tokenize and store a corpus, or return what already stands. Safe in several processes at once."""
    corpus = load_corpus(config, cache)
    settings = {key: value for key, value in what(config).items() if key not in BATCH_FIELDS}
    key = digest([settings, corpus.sources, SCHEMA])[:16]
    directory = cache / "prepared" / key
    record = once(directory, lambda temporary: _build(config, corpus, temporary))
    return Prepared(directory, record["id"], record)


def once(directory: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The record of a prepared directory, which ``build`` fills, whole or not at all, if it does not stand yet."""
    with _locked(directory.with_suffix(".lock")):
        record: dict[str, Any] | None = read_json(directory / "record.json")
        if record is None:
            temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
            try:
                record = build(temporary)
                write_json(temporary / "record.json", record)
                temporary.rename(directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return record


def content_id(files: Iterable[Path]) -> str:
    """One hash of the content of several files, in their order."""
    hasher = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()


def _build(config: CorpusConfig, corpus: Corpus, directory: Path) -> dict[str, Any]:
    assigned = _assign(corpus)
    tokenizer = train_tokenizer((text for text, _, split in assigned() if split == "train"), config.vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    counts = _write_tokens(assigned, tokenizer, directory)
    for split in SPLITS:
        if not counts[split]["documents"]:
            raise ConfigError(
                f"data={config.name}: no document fell into the {split} split "
                f"({sum(c['documents'] for c in counts.values())} documents in all); give more text, smaller documents "
                "(data.document=block) or files of its own (data.valid, data.test)"
            )
    names = ("tokenizer.json", *(f"{split}.npy" for split in SPLITS))
    return {
        "id": content_id(directory / name for name in names), "corpus": config.name,
        "vocab_size": tokenizer.get_vocab_size(), "splits": counts, "unigram_perplexity": _unigram(directory),
        "sources": corpus.sources, "licence": corpus.licence, "tokenizers": importlib.metadata.version("tokenizers"),
    }  # fmt: skip


def document_hash(text: str) -> int:
    """64 bits that depend on the text only, so that a document keeps its split wherever it stands."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _assign(corpus: Corpus) -> Callable[[], Iterator[tuple[str, int, str]]]:
    """A re-iterable of (text, hash, split); of equal documents only the first is kept, held-out before training."""
    given = [split for split in ("valid", "test", "train", "all") if split in corpus.documents]
    missing = [split for split in ("valid", "test") if split not in corpus.documents]

    def split_of(number: int, source: str) -> str:
        if source in ("valid", "test"):
            return source
        place = int(number / 2**64 / HELD_OUT)
        return missing[place] if place < len(missing) else "train"

    def assigned() -> Iterator[tuple[str, int, str]]:
        seen: set[int] = set()
        for source in given:
            for text in corpus.documents[source]():
                number = document_hash(text)
                if number not in seen:
                    seen.add(number)
                    yield text, number, split_of(number, source)

    return assigned


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) with RoBERTa's special tokens at ids 0 to 4."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def sentences(document: str) -> list[str]:
    """A document's sentences: lines, cut after sentence-final punctuation."""
    lines = (line.strip() for line in document.splitlines())
    return [part for line in lines if line for part in _SENTENCE_END.split(line)]


def _write_tokens(
    assigned: Callable[[], Iterator[tuple[str, int, str]]], tokenizer: Tokenizer, directory: Path
) -> dict[str, dict[str, int]]:
    """Encode every document and store each split's documents in the order of their hashes."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    index: dict[str, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
    written = dict.fromkeys(SPLITS, 0)
    raw = {split: (directory / f"{split}.raw").open("wb") for split in SPLITS}
    stream = assigned()
    while batch := list(islice(stream, _DOCUMENTS_AT_ONCE)):
        for (_, number, split), ids in zip(batch, _encode(tokenizer, [text for text, _, _ in batch]), strict=True):
            raw[split].write(np.asarray(ids, dtype=dtype).tobytes())
            index[split].append((number, written[split], len(ids)))
            written[split] += len(ids)
    for split, file in raw.items():
        file.close()
        _reorder(directory, split, sorted(index[split]), written[split], dtype)
    return {split: {"documents": len(index[split]), "tokens": written[split]} for split in SPLITS}


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text; the name of a special token (``<s>``) is text like any other."""
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def _encode(tokenizer: Tokenizer, documents: list[str]) -> Iterator[list[int]]:
    parts = [sentences(document) for document in documents]
    encoded = iter(encode_texts(tokenizer, [part for document in parts for part in document]))
    for document in parts:
        ids = [token for _ in document for token in (*next(encoded), EOS)]
        yield [*ids, EOS]


def _reorder(directory: Path, split: str, index: list[tuple[int, int, int]], total: int, dtype: type) -> None:
    source = directory / f"{split}.raw"
    tokens = np.lib.format.open_memmap(directory / f"{split}.npy", mode="w+", dtype=dtype, shape=(total,))
    if total:
        unordered = np.memmap(source, dtype=dtype, mode="r")
        place = 0
        for _, start, length in index:
            tokens[place : place + length] = unordered[start : start + length]
            place += length
    tokens.flush()
    source.unlink()


def _unigram(directory: Path) -> dict[str, float]:
    """Perplexity of the training split's add-one-smoothed token frequencies, on the other splits.

    Special tokens are left out, as they are never masked: this is what a masked LM reaches that has learned nothing
    but how frequent each token is.
    """
    splits = {split: np.load(directory / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    size = 1 + max(int(tokens.max()) for tokens in splits.values())
    counts = {split: np.bincount(tokens, minlength=size)[MASK + 1 :] for split, tokens in splits.items()}
    log_frequency = np.log((counts["train"] + 1) / (counts["train"] + 1).sum())
    return {
        split: float(np.exp(-(counts[split] * log_frequency).sum() / counts[split].sum()))
        for split in ("valid", "test")
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
