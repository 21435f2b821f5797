"""The user's own aligned sentences: two text files per split, or one file of two tab-separated columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path

from train_then_compress.config.base import reject
from train_then_compress.config.parallel import ParallelFiles
from train_then_compress.data.fetch import sha256_of
from train_then_compress.data.parallel import Pair, ParallelCorpus


def load(config: ParallelFiles, cache: Path) -> ParallelCorpus:
    """The files that ``data.train``, ``data.valid`` and ``data.test`` name; nothing is kept in ``cache``.

    Each is read once here. Raises `ConfigError` naming key and line for a file that is not there, empty or not UTF-8,
    for sides of unequal length and for a line without two columns.
    """
    pairs: dict[str, Callable[[], Iterable[Pair]]] = {}
    sources = {}
    for split in ("train", "valid", "test"):
        value = getattr(config, split)
        if value is None:
            continue
        key = f"data.{split}"
        paths = _files(key, value, config)
        pairs[split] = partial(_pairs, key, paths)
        if not sum(1 for _ in pairs[split]()):
            raise reject(key, value, "no sentence pairs in it")
        sources[split] = [sha256_of(path) for path in paths]
    return ParallelCorpus(pairs, sources, "the user's own text")


def _files(key: str, value: str, config: ParallelFiles) -> list[Path]:
    if value.endswith(".tsv"):
        paths = [Path(value).expanduser()]
    else:
        paths = [Path(f"{value}.{language}").expanduser() for language in (config.source, config.target)]
    for path in paths:
        if not path.is_file():
            found = ", ".join(sorted(other.name for other in path.parent.glob(f"{path.stem}.*"))) or "nothing"
            raise reject(key, value, f"{path} does not exist; expected PREFIX.{config.source} and "
                         f"PREFIX.{config.target} (data.source, data.target), or a file FILE.tsv; "
                         f"of that name there is {found}")  # fmt: skip
    return paths


def _pairs(key: str, paths: list[Path]) -> Iterator[Pair]:
    if len(paths) == 1:
        for number, line in enumerate(_lines(key, paths[0]), 1):
            columns = line.split("\t")
            if len(columns) != 2:
                raise reject(key, paths[0], f"line {number} has {len(columns)} tab-separated columns; 2 are needed")
            yield Pair(columns[0].strip(), columns[1].strip(), columns[0].strip())
        return
    for number, (source, target) in enumerate(zip_longest(*(_lines(key, path) for path in paths)), 1):
        if source is None or target is None:
            shorter, longer = (paths[0], paths[1]) if source is None else (paths[1], paths[0])
            raise reject(key, shorter, f"has {number - 1} lines, and {longer.name} has more; the sides must be aligned")
        yield Pair(source.strip(), target.strip(), source.strip())


def _lines(key: str, path: Path) -> Iterator[str]:
    """Lines end at ``\\n`` only: other separators that Unicode knows occur within sentences."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise reject(key, path, f"line {number} is not UTF-8; convert the file first") from None
    except OSError as error:
        raise reject(key, path, f"cannot be read: {error.strerror}") from None
