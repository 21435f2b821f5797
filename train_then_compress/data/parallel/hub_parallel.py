"""The column ``translation`` of a Hugging Face dataset, from the hub or from a local folder of the same form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from train_then_compress.config.base import reject
from train_then_compress.config.parallel import HubParallel
from train_then_compress.data.corpora.hub import identify, load_splits, split_names
from train_then_compress.data.parallel import INSTEAD, Pair, ParallelCorpus

_COLUMN = "translation"


def load(config: HubParallel, cache: Path) -> ParallelCorpus:
    """The splits of ``config.splits``; a slice such as ``train[:1%]`` is that split.

    ``datasets`` keeps the rows in its own cache on disk, from which they are mapped. Raises `ConfigError` for splits, a
    column or languages that are not there, `CorpusError` where the dataset cannot be had.
    """
    names = split_names(config.splits)
    loaded = load_splits(config.path, config.subset, names, config.revision, INSTEAD)
    for rows in loaded.values():
        feature = rows.features.get(_COLUMN)
        languages = getattr(feature, "languages", feature if isinstance(feature, dict) else ())
        if not languages:
            raise reject("data.path", config.path, f"a dataset with a column {_COLUMN!r} of sentences by language is "
                         f"needed; it has {', '.join(rows.column_names)}")  # fmt: skip
        for key in ("source", "target"):
            if getattr(config, key) not in languages:
                raise reject(f"data.{key}", getattr(config, key), f"the dataset's languages are {', '.join(languages)}")
    sources = identify(config.path, config.subset, config.revision) | {
        "splits": {name: len(loaded[split]) for name, split in names.items()}
    }
    pairs = {split: partial(_pairs, rows, config) for split, rows in loaded.items()}
    return ParallelCorpus(pairs, sources, config.licence)


def _pairs(rows: Any, config: HubParallel) -> Iterator[Pair]:
    for batch in rows.select_columns([_COLUMN]).iter(batch_size=1000):
        for row in batch[_COLUMN]:
            source, target = row[config.source] or "", row[config.target] or ""
            yield Pair(source, target, source)
