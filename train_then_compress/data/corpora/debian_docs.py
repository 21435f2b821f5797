"""Prose of Debian's documentation packages: about 80 MB of English for machines with apt."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train_then_compress.config.base import reject
from train_then_compress.config.data import DebianDocs
from train_then_compress.data.apt import Apt, depends_on
from train_then_compress.data.corpora import Corpus, CorpusError
from train_then_compress.data.prose import html_paragraphs, text_paragraphs
from train_then_compress.records import digest, read_json, write_json

#: What is read where data.packages is empty: the manuals with the most prose, on many subjects.
_PACKAGES = (
    "linux-doc", "python3-doc", "postgresql-doc", "apache2-doc", "racket-doc", "erlang-doc", "rust-doc",
    "qtbase5-doc-html", "anarchism", "python-sqlalchemy-doc", "sqlite3-doc", "python-django-doc",
    "libreoffice-help-en-us", "git-doc",
)  # fmt: skip
#: Raise this when the preparation changes, so that earlier prepared text is not taken for it.
_SCHEMA = 1
_LICENCE = (
    "free licences that differ by package (Debian's free software guidelines); each package's copyright file is kept "
    "beside the prepared text, in licences/"
)
_HTML = re.compile(r"\.x?html?(\.en)?(\.gz)?$")
_TEXT = re.compile(r"\.(txt|text|rst|md)(\.gz)?$")
#: A folder of pages in another language than English, e.g. ``pt-BR``.
_FOREIGN = re.compile(r"(?!en)[a-z]{2,3}[-_][A-Z]{2}")
#: Text that every package has and that documents nothing.
_FORMALITY = re.compile(r"(authors|changelog|changes|copying|copyright|history|licen[cs]e|news|readme\.debian|todo)")
_LEVELS = 2


def load(config: DebianDocs, cache: Path) -> Corpus:
    """The packages' prose, prepared on first use (minutes); a document is a page, a line of it a paragraph.

    Raises `CorpusError` without apt, `ConfigError` for a package of ``data.packages`` that apt does not know.
    """
    packages = config.packages or list(_PACKAGES)
    folder = cache / f"debian_docs-{digest([sorted(set(packages)), _SCHEMA])[:8]}"
    cache.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _prepare(sorted(set(packages)), folder, known=bool(config.packages))
    record = read_json(folder / "record.json")
    return Corpus({"all": lambda: _documents(folder, record["sha256"])}, record, _LICENCE)


def _documents(folder: Path, sha256: str) -> Iterator[str]:
    text = hashlib.sha256()
    try:
        with gzip.open(folder / "documents.jsonl.gz", "rb") as file:
            for line in file:
                text.update(line)
                yield "\n".join(json.loads(line)["paragraphs"])
        whole = text.hexdigest() == sha256
    except (OSError, EOFError, ValueError, zlib.error):
        whole = False
    if not whole:
        raise CorpusError(f"the prepared text in {folder} is damaged; remove that directory to prepare it again")


@dataclass
class _Preparation:
    """What has been written so far."""

    versions: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    documents: int = 0
    words: int = 0
    bytes: int = 0


def _prepare(packages: list[str], folder: Path, known: bool) -> None:
    """Write the prose of ``packages`` as ``folder``, whole or not at all; a ``known`` package must be there."""
    for left_by_a_kill in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left_by_a_kill)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        work, prepared = Path(temporary), Path(temporary, "prepared")
        (prepared / "licences").mkdir(parents=True)
        done, text, start = _Preparation(), hashlib.sha256(), time.monotonic()
        apt = Apt(work / "apt")
        with gzip.GzipFile(prepared / "documents.jsonl.gz", "wb", compresslevel=6, mtime=0) as file:
            for number, package in enumerate(packages, 1):
                print(f"debian_docs: {number}/{len(packages)} {package}", file=sys.stderr, flush=True)
                for document in _read(apt, package, prepared, done):
                    line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
                    text.update(line)
                    file.write(line)
                if known and done.missing:
                    raise reject("data.packages", package, "apt's package lists have no package of this name")
                note = "not known to apt here, left out; " if package in done.missing else ""
                print(f"    {note}{done.words:,} words, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if not done.documents:
            raise CorpusError(f"no prose in any of {', '.join(packages)}")
        write_json(prepared / "record.json", {
            "packages": dict(sorted(done.versions.items())), "missing": done.missing, "sha256": text.hexdigest(),
            "documents": done.documents, "words": done.words, "bytes": done.bytes,
        })  # fmt: skip
        prepared.rename(folder)


def _read(apt: Apt, package: str, prepared: Path, done: _Preparation, level: int = 0) -> Iterator[dict[str, object]]:
    """A package's documents; those of what it depends on where it has none of its own (a metapackage)."""
    if package in done.versions or package in done.missing:
        return
    control = apt.show(package)
    if control is None:
        done.missing.append(package)
        return
    done.versions[package] = control["Version"]
    tree = prepared.parent / "tree"
    _check_space(package, control, tree.parent)
    apt.unpack(package, tree)
    _keep_licence(tree, package, prepared / "licences")
    pages = list(_pages(tree))
    for page in pages:
        paragraphs = _new_paragraphs(page, done)
        if paragraphs:
            done.documents += 1
            yield {"package": package, "page": str(page.relative_to(tree)), "paragraphs": paragraphs}
    shutil.rmtree(tree)
    if not pages and level < _LEVELS:
        for name in depends_on(control):
            if _is_documentation(apt.show(name)):
                yield from _read(apt, name, prepared, done, level + 1)


def _is_documentation(control: dict[str, str] | None) -> bool:
    return control is not None and (control.get("Section", "").endswith("doc") or "doc" in control["Package"])


def _check_space(package: str, control: dict[str, str], folder: Path) -> None:
    needed = int(control.get("Installed-Size", 0)) * 1024 + int(control.get("Size", 0))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CorpusError(
            f"{package} takes {needed / 1e6:.0f} MB while it is read, and {free / 1e6:.0f} MB are free there; "
            "give paths.cache another place, or data.packages smaller ones"
        )


def _keep_licence(tree: Path, package: str, licences: Path) -> None:
    copyright_file = tree / "usr/share/doc" / package / "copyright"
    if copyright_file.is_file() and not copyright_file.is_symlink():
        shutil.copyfile(copyright_file, licences / f"{package}.txt")


def _pages(tree: Path) -> Iterator[Path]:
    """The HTML pages of a package, or its text files if there are none (they are mostly the pages' sources)."""
    # Links are left out: they point to pages read elsewhere, or out of the tree.
    files = sorted(
        path for directory, _, names in os.walk(tree) for path in (Path(directory, name) for name in names)
        if path.is_file() and not path.is_symlink() and not any(map(_FOREIGN.fullmatch, path.relative_to(tree).parts))
    )  # fmt: skip
    pages = [path for path in files if _HTML.search(path.name.lower())]
    texts = [path for path in files if _TEXT.search(path.name.lower()) and not _FORMALITY.match(path.name.lower())]
    yield from pages or texts


def _new_paragraphs(page: Path, done: _Preparation) -> list[str]:
    """A page's prose paragraphs that no page before it had; they are counted."""
    raw = page.read_bytes()
    if page.suffix == ".gz":
        raw = gzip.decompress(raw)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    new = []
    for paragraph in html_paragraphs(text) if _HTML.search(page.name.lower()) else text_paragraphs(text):
        identity = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
        if identity not in done.seen:
            done.seen.add(identity)
            new.append(paragraph)
            done.words += len(paragraph.split())
            done.bytes += len(paragraph.encode()) + 1
    return new
