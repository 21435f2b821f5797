"""Parallel corpora: each module is named like its config and has one function ``load(config, cache)``. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from train_then_compress.config.parallel import ParallelConfig

#: What the errors of corpora that must be fetched end by.
INSTEAD = "Use your own sentence pairs (data=parallel_files data.train=PREFIX_OR_TSV)."


class Pair(NamedTuple):
    """A sentence and its translation. Pairs of one ``group`` (a package, a page) share their split."""

    source: str
    target: str
    group: str


@dataclass(frozen=True)
class ParallelCorpus:
    """The pairs of a corpus and where they come from; the splits that are missing are held out of ``train``.

    ``sources``: what was read (names, versions, SHA-256), no path of this machine. ``punctuated``: sentences end with a
    full stop, so that fragments can be told from them.
    """

    pairs: Mapping[str, Callable[[], Iterable[Pair]]]
    sources: dict[str, Any]
    licence: str
    punctuated: bool = False


@dataclass(frozen=True)
class TokenizedCorpus:
    """Pairs that are tokens already, taken as they are.

    ``tokens``: split -> a function that gives a fresh iterator of pairs of token ids, without ``</s>``. ``texts``:
    split -> its sources, which ``tokenizer`` turns into the same ids, and its references as they are scored.
    """

    tokens: Mapping[str, Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]]
    texts: Callable[[str], list[tuple[str, str]]]
    tokenizer: Tokenizer
    sources: dict[str, Any]
    licence: str


def load_parallel(config: ParallelConfig, cache: Path) -> ParallelCorpus | TokenizedCorpus:
    """The corpus that a config names, fetched into ``cache`` (a directory) if it must be.

    Raises `ConfigError` for a setting that cannot be used and `CorpusError` for what cannot be fetched.
    """
    module = importlib.import_module(f"{__name__}.{config.name}")
    corpus: ParallelCorpus | TokenizedCorpus = module.load(config, cache)
    return corpus
