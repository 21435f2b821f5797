"""Corpora: each module is named like its config and has one function ``load(config, cache)``. Knows no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_then_compress.config import CorpusConfig


class CorpusError(RuntimeError):
    """A corpus that cannot be had on this machine; the message says why and names what to use instead."""


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus and where they come from.

    ``documents``: split name -> a function that gives a fresh iterator of documents; the key ``all`` alone means
    "split by hash of the document"; where ``train`` stands without ``valid`` or ``test``, the missing one is held
    out of it by the caller. ``sources``: what was read (names, versions, SHA-256), no path of this machine.
    """

    documents: Mapping[str, Callable[[], Iterable[str]]]
    sources: dict[str, Any]
    licence: str


def load_corpus(config: CorpusConfig, cache: Path) -> Corpus:
    """The corpus that a config names, fetched into ``cache`` (a directory) if it must be.

    Raises `ConfigError` for a setting that cannot be used and `CorpusError` for what cannot be fetched.
    """
    module = importlib.import_module(f"{__name__}.{config.name}")
    corpus: Corpus = module.load(config, cache)
    return corpus
