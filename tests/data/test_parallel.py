"""Loaders of parallel corpora, on files that the tests make; no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from train_then_compress import sweep
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.parallel import DebianPairs, HubParallel, ParallelFiles
from train_then_compress.data.corpora import CorpusError
from train_then_compress.data.parallel import Pair, ParallelCorpus, load_parallel


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(corpus: ParallelCorpus, split: str = "train") -> list[Pair]:
    return list(corpus.pairs[split]())


def test_two_files_and_a_table_give_the_same_pairs(tmp_path: Path) -> None:
    rows = [("a boat\u2028here", "una barca qui"), ("two", "due"), ("", "vuoto")]
    for side, language in enumerate(("en", "it")):
        write(tmp_path, f"train.{language}", *(row[side] for row in rows))
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + "".join("\t".join(row) + "\r\n" for row in rows).encode())
    pairs = [Pair(source, target, source) for source, target in rows]
    for train in ("train", "a.tsv"):
        assert read(load_parallel(ParallelFiles(train=str(tmp_path / train)), tmp_path)) == pairs


# What makes a corpus unusable: each is refused in words by `ttc run`, which then starts nothing.
UNUSABLE: list[tuple[dict[str, bytes], str, str]] = [
    ({}, "train", r"train.en does not exist; expected PREFIX.en and PREFIX.it .* of that name there is nothing"),
    ({"train.en": b"a\n", "train.fr": b"a\n"}, "train", r"train.it does not exist.*there is train.en, train.fr"),
    ({"train.en": b"a b c\n", "train.it": b"a b c\nd\n"}, "train", r"train.en: has 1 lines, and train.it has more"),
    ({"train.en": b"a b c\nd\n", "train.it": b"a b c\n"}, "train", r"train.it: has 1 lines, and train.en has more"),
    ({"train.en": b"", "train.it": b""}, "train", r"data.train=.*train: no sentence pairs in it"),
    ({"train.en": b"one\ntwo \xff\n", "train.it": b"uno\ndue\n"}, "train", r"train.en: line 2 is not UTF-8"),
    ({"a.tsv": b"a\tb\na\tb\tc\n"}, "a.tsv", r"line 2 has 3 tab-separated columns; 2 are needed"),
    ({"a.tsv": b"a b\n"}, "a.tsv", r"line 1 has 1 tab-separated columns; 2 are needed"),
]


@pytest.mark.parametrize("files, train, words", UNUSABLE)
def test_unusable_files_are_refused_before_training(
    files: dict[str, bytes], train: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_parallel(ParallelFiles(train=str(tmp_path / train)), tmp_path)
    _refused(tmp_path, capsys, "data=parallel_files", f"data.train={tmp_path / train}")


def _refused(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `ttc run` says; it must not have started anything."""
    places = [f"paths.runs={folder / 'runs'}", f"paths.cache={folder / 'cache'}"]
    assert sweep.run(["task=translation", "model=transformer", *overrides, *places]) == 2
    assert not list(folder.glob("runs/*/*"))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


def test_one_language_is_not_a_pair() -> None:
    with pytest.raises(ConfigError, match=r"data.target=en: the same as data.source"):
        Config.build({"task": {"name": "translation"}, "model": {"name": "transformer"},
                      "data": {"name": "parallel_files", "train": "x", "target": "en"}})  # fmt: skip


# hub_parallel, on local folders in the hub's layout.

ROWS = [{"en": f"boat {n}", "fr": f"bateau {n}"} for n in range(5)]


@pytest.fixture
def translations(hub: Path) -> Path:
    """A dataset like WMT14's in a folder."""
    (hub / "fr-en").mkdir(parents=True)
    features = datasets.Features({"translation": datasets.Translation(languages=["en", "fr"])})
    for split, rows in (("train", ROWS), ("validation", ROWS[:2]), ("test", ROWS[2:])):
        table = datasets.Dataset.from_dict({"translation": rows}, features)
        table.to_parquet(hub / f"fr-en/{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"fr-en/{split}-*"} for split in ("train", "validation", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": "fr-en", "data_files": files}]})
    (hub / "README.md").write_text(f"---\n{card}---\n")
    return hub


def test_a_dataset_of_the_hub_is_read_in_either_direction(translations: Path, tmp_path: Path) -> None:
    corpus = load_parallel(HubParallel(path=str(translations), licence="CC0"), tmp_path)
    assert read(corpus) == [Pair(row["en"], row["fr"], row["en"]) for row in ROWS]
    assert [len(read(corpus, split)) for split in ("valid", "test")] == [2, 3] and corpus.licence == "CC0"
    assert corpus.sources["splits"] == {"train": 5, "validation": 2, "test": 3}
    assert len(corpus.sources["files"]["fr-en/test-00000-of-00001.parquet"]) == 64
    assert str(tmp_path) not in json.dumps(corpus.sources)
    other = load_parallel(
        HubParallel(path=str(translations), source="fr", target="en", splits=["train[:40%]"]), tmp_path
    )
    assert read(other) == [Pair(row["fr"], row["en"], row["fr"]) for row in ROWS[:2]] and set(other.pairs) == {"train"}


def test_what_a_dataset_lacks_is_named(
    translations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = _refused(tmp_path, capsys, "data=wmt14_en_fr", f"data.path={translations}", "data.target=de")
    assert "data.target=de: the dataset's languages are en, fr" in said
    with pytest.raises(ConfigError, match=r"data\.splits="):
        load_parallel(HubParallel(path=str(translations), splits=["train", "dev"]), tmp_path)
    datasets.Dataset.from_dict({"en": ["a"], "fr": ["b"]}).to_parquet(tmp_path / "flat/train.parquet")
    with pytest.raises(ConfigError, match=r"data\.path=.*a column 'translation' of sentences .*; it has en, fr"):
        load_parallel(HubParallel(path=str(tmp_path / "flat"), subset=None, splits=["train"]), tmp_path)
    with pytest.raises(CorpusError, match=r"data\.path=nobody/nothing.*(?s:.)*data=parallel_files"):
        load_parallel(HubParallel(path="nobody/nothing", subset=None), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"needs the package `datasets`.*data=parallel_files"):
        load_parallel(HubParallel(path=str(translations)), tmp_path)


# debian_pairs, through stand-ins for apt.

STAND_IN = """\
#!{python} -SE
import pathlib, re, shutil, sys
archive, program = pathlib.Path({archive!r}), pathlib.Path(sys.argv[0]).name
if program == "dpkg-deb":
    shutil.copytree(pathlib.Path(sys.argv[2]).read_text(), sys.argv[3], dirs_exist_ok=True)
    sys.exit()
configuration = pathlib.Path(sys.argv[sys.argv.index("-c") + 1]).read_text()
lists = pathlib.Path(re.search('Dir::State::Lists "(.*)"', configuration)[1])
package = archive / sys.argv[-1]
if sys.argv[-1] == "update":
    assert 'Acquire::Languages {{ "en"; "it"; }};' in configuration
    for path in archive.glob("host_*"):
        shutil.copy(path, lists)
elif not package.exists():
    sys.exit("E: No packages found")
elif program == "apt-cache":
    print("Package: " + package.name + "\\nVersion: 1\\n")
else:
    pathlib.Path(package.name + "_1_all.deb").write_text(str(package))
"""
ENGLISH = """\
Package: boat
Description-md5: aaa
Description-en: program for boats
 It draws boats. It also draws
 harbours.
 .
 A second paragraph:
  * one entry that is
    long
  * another; it stays alone
 .
 Boat 2000, GPL.

Package: net
Description-md5: bbb
Description-en: program for nets
 Not the same
 .
 as on the other side.

Package: untranslated
Description-md5: ccc
Description-en: in English alone
"""
ITALIAN = """\
Package: boat
Description-md5: aaa
Description-it: programma per barche
 Disegna barche. È anche per
 porti.
 .
 Un secondo paragrafo:
  - una voce
    lunga
  - un'altra. Sta sola
 .
 Boat 2000 (GPL)

Package: net
Description-md5: bbb
Description-it: programma per reti
 Non come dall'altra parte.
"""
PAGE = (
    '<html><body><h1 id="h">{}</h1><p id="p1">{} <b>x</b></p><p id="p2">{}<br>a <span class="switchinline">'
    '<span hidden="true" class="MAC"><span>Cmd</span></span><span hidden="true" id="d">Ctrl</span></span></p>'
    '<p id="c" class="bascode">{}</p><p>no id</p></body></html>'
)


def test_descriptions_and_help_pages_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, programs = tmp_path / "archive", tmp_path / "bin"
    for side, words in (("en-us", "Save"), ("it", "Salva")):
        pages = archive / f"libreoffice-help-{side}" / "help" / side / "text"
        pages.mkdir(parents=True)
        (pages / "01.html").write_text(
            PAGE.format(words, f"{words} one. {words} two.", f"{words} three", f"{words} code")
        )
    (archive / "host_Packages").write_text("Package: boat\nSource: boats (1.0)\n")
    (archive / "host_i18n_Translation-en").write_text(ENGLISH)
    (archive / "host_i18n_Translation-it").write_text(ITALIAN.replace(" .\n", " \n"))
    programs.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable, archive=str(archive)))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    corpus = load_parallel(DebianPairs(), tmp_path / "cache")
    assert corpus.sources["packages"] == {"libreoffice-help-en-us": "1", "libreoffice-help-it": "1"}
    pairs = read(corpus)
    assert len(pairs) == len(set(pairs)) and set(pairs) == {
        Pair("program for boats", "programma per barche", "boats"), Pair("It draws boats.", "Disegna barche.", "boats"),
        Pair("It also draws harbours.", "È anche per porti.", "boats"),
        Pair("A second paragraph:", "Un secondo paragrafo:", "boats"),
        Pair("one entry that is long", "una voce lunga", "boats"),
        Pair("another; it stays alone", "un'altra. Sta sola", "boats"),
        Pair("program for nets", "programma per reti", "net"), Pair("Save", "Salva", "01.html"),
        Pair("Save one.", "Salva one.", "01.html"), Pair("Save two. x", "Salva two. x", "01.html"),
        Pair("Save three a Ctrl", "Salva three a Ctrl", "01.html"),
    }  # fmt: skip


def test_without_apt_the_error_names_what_to_use_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = _refused(tmp_path, capsys, "data=debian_en_it")
    assert "apt-get, apt-cache, dpkg-deb (Debian or Ubuntu), not found here" in said and "data=parallel_files" in said
    assert "data.target='xx': must be " in _refused(tmp_path, capsys, "data=debian_en_it", "data.target=xx")
