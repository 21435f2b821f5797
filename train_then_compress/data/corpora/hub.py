"""A text column of a Hugging Face dataset, from the hub or from a local folder of the same form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from train_then_compress.config.base import reject
from train_then_compress.config.data import HubCorpus
from train_then_compress.data.corpora import Corpus, CorpusError
from train_then_compress.data.fetch import sha256_of

_COLUMN = "text"
#: The hub's names of splits, and ours.
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
#: Level 1 only: " = Title = "; sections are " = = Section = = " (Merity et al. 2016, WikiText).
_HEADING = re.compile(r" = (?!= ).*(?<! =) = ?")
_INSTEAD = "Use the corpus that needs no hub (data=sotu_wiki), or your own text (data=text_files data.train=PATH)."


def load(config: HubCorpus, cache: Path) -> Corpus:
    """The splits of ``config.splits``; a slice such as ``train[:1%]`` is that split. ``datasets`` keeps its own cache.

    Raises `ConfigError` for splits or a column that are not there, `CorpusError` where the dataset cannot be had.
    """
    names = split_names(config.splits)
    loaded = load_splits(config.path, config.subset, names)
    documents: dict[str, Callable[[], Iterable[str]]] = {}
    for split, rows in loaded.items():
        if _COLUMN not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise reject("data.path", config.path, f"a dataset with a column {_COLUMN!r} is needed; it has {columns}")
        documents[split] = partial(_articles if config.documents == "wikitext_headings" else _stripped, rows)
    sources = identify(config.path, config.subset) | {
        "splits": {name: len(loaded[split]) for name, split in names.items()}
    }
    return Corpus({"all": documents["train"]} if len(documents) == 1 else documents, sources, config.licence)


def split_names(splits: list[str]) -> dict[str, str]:
    """The splits asked for -> train, valid, test."""
    names = {name: _SPLITS.get(name.partition("[")[0], "") for name in splits}
    found = sorted(names.values())
    if "" in found or "train" not in found or len(found) > len(set(found)):
        raise reject("data.splits", splits, "train, and if wanted validation and test, each once")
    return names


def load_splits(
    path: str, subset: str | None, names: dict[str, str], revision: str | None = None, instead: str = _INSTEAD
) -> dict[str, Any]:
    """Rows of a dataset, memory-mapped, by our name of the split; ``names``: the dataset's name -> ours.

    Raises `CorpusError`, which ends by ``instead``, where the dataset cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"data.path={path} needs the package `datasets`: pip install 'train_then_compress[hub]'. {instead}"
        ) from None
    try:
        return {split: datasets.load_dataset(path, subset, split=name, revision=revision)
                for name, split in names.items()}  # fmt: skip
    except Exception as error:  # whatever the hub, the network or a damaged file makes `datasets` raise
        reason = " ".join(str(error).split()) or type(error).__name__
        part = f" (data.subset={subset})" if subset else ""
        raise CorpusError(f"data.path={path}{part} could not be loaded: {reason}\n{instead}") from error


def identify(path: str, subset: str | None, revision: str | None = None) -> dict[str, Any]:
    """What pins the text: the hub's revision, or the hashes of a local folder's files."""
    folder = Path(path)
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {"files": {str(file.relative_to(folder)): sha256_of(file) for file in files}}
    import datasets

    return {"path": path, "revision": datasets.load_dataset_builder(path, subset, revision=revision).hash}


def _texts(rows: Any) -> Iterator[str]:
    for batch in rows.select_columns([_COLUMN]).iter(batch_size=1000):
        yield from (text or "" for text in batch[_COLUMN])


def _stripped(rows: Any) -> Iterator[str]:
    """A row is a document."""
    yield from filter(None, map(str.strip, _texts(rows)))


def _articles(rows: Any) -> Iterator[str]:
    """A row is a line; an article begins at a level-1 heading that follows an empty line or nothing."""
    article: list[str] = []
    after_empty = True
    for line in _texts(rows):
        if after_empty and article and _HEADING.fullmatch(line.rstrip("\n")):
            yield "\n".join(article)
            article = []
        after_empty = not line.strip()
        if not after_empty:
            article.append(line.strip())
    if article:
        yield "\n".join(article)
