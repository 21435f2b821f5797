"""Human translations of package descriptions and of LibreOffice's help, through apt.

Descriptions are joined by the MD5 sum of the English one, which the archive's index of translations gives; pages of
the help by the paragraph ids that both languages share.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from train_then_compress.config.parallel import DebianPairs
from train_then_compress.data.apt import Apt
from train_then_compress.data.corpora import CorpusError
from train_then_compress.data.fetch import sha256_of
from train_then_compress.data.parallel import INSTEAD, Pair, ParallelCorpus

_LICENCE = (
    "package descriptions: under the free licence of each package's Debian files, translations by the Debian "
    "Description Translation Project; LibreOffice's help: MPL 2.0"
)
_SCHEMA = 2
_HELP = "libreoffice-help-{}"
_HELP_OF = {"en": "en-us"}
_SPACES = re.compile(r"\s+")
#: As in `prepare.sentences`, with the capitals and quotes of these languages.
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]”’»]))\s+(?=["'(\[“‘«„]?[A-Z0-9À-ÖØ-Þ])""")
#: What begins an entry of a list.
_ENTRY = re.compile(r"^[-*+•·]\s+")
_WORD = re.compile(r"\w+")


def load(config: DebianPairs, cache: Path) -> ParallelCorpus:
    """Aligned sentences; a group is a source package or a help page. Fetched on first use (about a minute).

    Raises `CorpusError` without apt.
    """
    path = cache / f"debian_pairs-{config.target}-{_SCHEMA}.jsonl.gz"
    cache.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            _fetch(config.target, path)

    def pairs() -> Iterator[Pair]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            next(file)
            yield from (Pair(*json.loads(line)) for line in file)

    with gzip.open(path, "rt", encoding="utf-8") as file:
        packages = json.loads(file.readline())
    sources = {"packages": packages, "sha256": sha256_of(path)}
    return ParallelCorpus({"train": pairs}, sources, _LICENCE, punctuated=True)


def _fetch(language: str, path: Path) -> None:
    """A line with the versions of packages, then a line a pair."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary)
        apt = Apt(folder / "apt", ("en", language), INSTEAD)
        pairs = list(_descriptions(apt, language))
        packages = [_HELP.format(_HELP_OF.get(side, side)) for side in ("en", language)]
        versions = {package: fields["Version"] for package in packages if (fields := apt.show(package)) is not None}
        if len(versions) == 2:
            for package in packages:
                apt.unpack(package, folder / package)
            pairs += _help(*(folder / package for package in packages))
        if not pairs:
            raise CorpusError(f"apt's lists have no descriptions in {language} and no help of LibreOffice")
        written = folder / "pairs"
        with gzip.GzipFile(written, "wb", mtime=0) as file:
            for row in (versions, *sorted(set(pairs))):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        written.rename(path)


def _descriptions(apt: Apt, language: str) -> Iterator[Pair]:
    sources = {package["Package"]: package.get("Source", package["Package"]).split()[0]
               for package in apt.index("Packages")}  # fmt: skip
    translated = {fields["Description-md5"]: fields for fields in apt.index(f"i18n_Translation-{language}")}
    for fields in apt.index("i18n_Translation-en"):
        other = translated.get(fields["Description-md5"])
        if other is not None:
            group = sources.get(fields["Package"], fields["Package"])
            sides = _description(fields["Description-en"]), _description(other[f"Description-{language}"])
            yield from _aligned(*sides, group)


def _description(field: str) -> list[str]:
    """A description's synopsis, paragraphs and entries of lists, without what marks them.

    Unlike `apt.description` this takes indented lines together: the sides break them at different words.
    """
    synopsis, *lines = field.splitlines()
    paragraphs, running = [synopsis.strip()], False
    for line in map(str.strip, lines):
        if line in ("", "."):
            running = False
        elif running and not _ENTRY.match(line):
            paragraphs[-1] += " " + line
        else:
            paragraphs.append(_ENTRY.sub("", line))
            running = True
    return paragraphs


def _aligned(source: list[str], target: list[str], group: str) -> Iterator[Pair]:
    """Paragraphs where there are as many on both sides, and within them sentences likewise, else whole paragraphs.

    The first ones, synopses, belong together in any case. What has the same words on both sides is not translated.
    """
    for one, other in zip(source, target, strict=True) if len(source) == len(target) else [(source[0], target[0])]:
        parts, others = _SENTENCE_END.split(one), _SENTENCE_END.split(other)
        if len(parts) != len(others):
            parts, others = [one], [other]
        for pair in zip(parts, others, strict=True):
            if _WORD.findall(pair[0].lower()) != _WORD.findall(pair[1].lower()):
                yield Pair(*pair, group)


def _help(english: Path, foreign: Path) -> Iterator[Pair]:
    """Both trees have the same pages below a folder named like the language."""
    pages, others = _pages(english), _pages(foreign)
    for name in sorted(pages.keys() & others.keys()):
        source, target = (_paragraphs(path.read_text(encoding="utf-8", errors="replace"))
                          for path in (pages[name], others[name]))  # fmt: skip
        for identity in source.keys() & target.keys():
            yield from _aligned([source[identity]], [target[identity]], name)


def _pages(tree: Path) -> dict[str, Path]:
    """HTML pages by their path below the language's folder (``.../help/<language>/text/...``)."""
    return {str(path).partition("/text/")[2]: path for path in sorted(tree.rglob("*.html")) if "/text/" in str(path)}


class _Reader(HTMLParser):
    """Collects the text of paragraphs and headings that have an id; without code, and without what is said of other
    systems than the reader's in a hidden ``<span class="MAC">``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag in ("p", "h1", "h2", "h3", "h4", "h5", "h6"):
            self._open.append((tag, None if "code" in values.get("class", "") else values.get("id")))
        elif tag == "span" and (self._hidden or ("hidden" in values and "class" in values)):
            self._hidden += 1
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._hidden:
            self._hidden -= 1
        elif self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1] and not self._hidden:
            identity = self._open[-1][1]
            self.found[identity] = self.found.get(identity, "") + data


def _paragraphs(html: str) -> dict[str, str]:
    reader = _Reader()
    reader.feed(html)
    texts: Iterable[tuple[str, str]] = ((key, _SPACES.sub(" ", text).strip()) for key, text in reader.found.items())
    return {key: text for key, text in texts if text}
