"""The user's own UTF-8 text files."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from train_then_compress.config.base import ConfigError, reject
from train_then_compress.config.data import TextFiles
from train_then_compress.data.corpora import Corpus

_SPLITS = ("train", "valid", "test")


def load(config: TextFiles, cache: Path) -> Corpus:
    """The files that ``data.train``, ``data.valid`` and ``data.test`` name; nothing is kept in ``cache``.

    Every file is read once here. Raises `ConfigError` naming the key for a path without files, for bytes that are
    not UTF-8, for files without text and for a file that stands in two splits.
    """
    files: dict[str, list[tuple[str, str, Path]]] = {}
    for split in _SPLITS:
        value = getattr(config, split)
        if value is not None:
            key = f"data.{split}"
            files[split] = sorted((path.name, _check(path, key), path) for path in _find(value, key))
            if not any(line.strip() for _, _, path in files[split] for line in _lines(path)):
                raise reject(key, value, f"nothing but blanks in {len(files[split])} file(s); text is needed")
    _check_apart(config, files)
    documents: dict[str, Callable[[], Iterable[str]]] = {
        split: partial(_documents, [path for _, _, path in found], config.document) for split, found in files.items()
    }
    sources = {split: [{"name": name, "sha256": sha256} for name, sha256, _ in found] for split, found in files.items()}
    return Corpus({"all": documents["train"]} if len(documents) == 1 else documents, sources, "the user's own text")


def _find(value: str, key: str) -> list[Path]:
    path = Path(value).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found, problem = list(path.rglob("*.txt")), "no *.txt in this folder or below it"
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - it may be absolute
        problem = "no such file or folder, and no file matches it as a glob"
    files = [path for path in found if path.is_file()]
    if not files:
        raise reject(key, value, problem)
    return files


def _check(path: Path, key: str) -> str:
    """The SHA-256 of a file's content, once it has been read as UTF-8 to its end."""
    sha256, position = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            for line in file:
                line.decode()
                sha256.update(line)
                position += len(line)
    except UnicodeDecodeError as error:
        where = f"byte {position + error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError(f"{key}: {path} is not UTF-8: {where}; convert it first") from None
    except OSError as error:
        raise reject(key, path, f"cannot be read: {error.strerror}") from None
    return sha256.hexdigest()


def _check_apart(config: TextFiles, files: dict[str, list[tuple[str, str, Path]]]) -> None:
    """The same file in two splits would be trained on and reported."""
    seen: dict[str, str] = {}
    for split, found in files.items():
        for name, sha256, _ in found:
            if seen.setdefault(sha256, split) != split:
                raise reject(f"data.{split}", getattr(config, split), f"{name} is also in data.{seen[sha256]}")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from file


def _documents(paths: list[Path], document: str) -> Iterator[str]:
    for path in paths:
        block: list[str] = []
        for line in _lines(path):
            if line.strip() or document == "file":
                block.append(line)
            elif block:
                yield "".join(block).strip()
                block = []
        text = "".join(block).strip()
        if text:
            yield text
