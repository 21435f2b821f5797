"""fairseq's binary files: read as fairseq reads them, written so that fairseq reads them. fairseq is the reference."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from train_then_compress import sweep
from train_then_compress.config import ConfigError
from train_then_compress.config.parallel import FairseqBin, ParallelFiles
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.pairs import Pairs, prepare_pairs
from train_then_compress.data.parallel import load_parallel
from train_then_compress.data.parallel.fairseq_bin import _tokenizer
from train_then_compress.data.prepare import SPLITS, Prepared

pytest.importorskip("fairseq")

SIZES = {"train": 40, "valid": 5, "test": 7}
_WORDS = {
    "en": ["the", "bo@@", "at", "lies", "in", "old", "har@@", "bour", "¼", "été", "@@", "a@@", "@@b"],
    "it": ["la", "bar@@", "ca", "sta", "nel", "vec@@", "chio", "porto"],
}


def preprocess(text: Path, folder: Path, *more: str) -> None:
    """`fairseq-preprocess`."""
    from fairseq import options
    from fairseq_cli import preprocess

    prefixes = [part for split in SPLITS for part in (f"--{split}pref", str(text / split))]
    arguments = ["-s", "en", "-t", "it", *prefixes, "--destdir", str(folder), "--workers", "1", *more]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up sentences of BPE pieces, of several lengths, one of them empty, some of words not in training."""
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    for split, size in SIZES.items():
        for language, words in _WORDS.items():
            lines = [" ".join(choose.choices(words, k=choose.randint(1, 12))) for _ in range(size)]
            lines[1] = "" if split == "train" else f"{lines[1]} new{language}@@ word"
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def binary(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("binary") / "bin"
    preprocess(text, folder, "--joined-dictionary")
    return folder


def dataset(folder: Path, split: str, language: str, pair: str = "en-it") -> list[list[int]]:
    """fairseq's own reader."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    read = MMapIndexedDataset(str(folder / f"{split}.{pair}.{language}"))
    return [read[number].tolist() for number in range(len(read))]


def sides(data: Pairs, split: str, side: int) -> list[list[int]]:
    """Ours, with `</s>`."""
    pairs = data.split(split)
    return [[*pairs.sides(number)[side].tolist(), 2] for number in range(len(pairs))]


def test_tokens_and_text_are_those_of_fairseq(binary: Path, text: Path, tmp_path: Path) -> None:
    from fairseq.data import Dictionary

    data = prepare_pairs(FairseqBin(path=str(binary)), tmp_path)
    dictionary = Dictionary.load(str(binary / "dict.en.txt"))
    assert data.vocab_size == len(dictionary)
    tokenizer = Tokenizer.from_file(str(data.tokenizer))
    assert [tokenizer.id_to_token(number) for number in range(len(dictionary))] == dictionary.symbols
    for split, size in SIZES.items():
        for side, language in enumerate(("en", "it")):
            assert sides(data, split, side) == dataset(binary, split, language)
        assert data.record["splits"][split]["pairs"] == size
    for split in ("valid", "test"):
        sources, references = data.texts(split)
        encoded = [[*encoding.ids, dictionary.eos()] for encoding in tokenizer.encode_batch(sources)]
        assert encoded == dataset(binary, split, "en")
        targets = dataset(binary, split, "it")
        assert references == [dictionary.string(ids, "subword_nmt", escape_unk=True) for ids in targets]
        assert any("<<unk>>" in reference for reference in references)
        copies = [dictionary.string(ids, "subword_nmt") for ids in dataset(binary, split, "en")]
        assert data.copies(split) == [" ".join(copy.split()) for copy in copies]


@pytest.mark.parametrize(
    "bpe, mark", [("subword_nmt", "subword_nmt"), ("sentencepiece", "sentencepiece"), ("none", None)]
)
@given(words=st.lists(st.text("ab@▁", min_size=1), max_size=8))
def test_tokens_become_words_as_in_fairseq(bpe: str, mark: str | None, words: list[str]) -> None:
    from fairseq.data.data_utils import post_process

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(words)]
    tokenizer = _tokenizer(symbols, bpe)
    decoded = tokenizer.decode([symbols.index(word) for word in words])
    assert decoded.split() == post_process(" ".join(words), mark).split()


def test_both_directions_are_read_from_the_same_files(binary: Path, tmp_path: Path) -> None:
    data = prepare_pairs(FairseqBin(path=str(binary), source="it", target="en"), tmp_path)
    assert sides(data, "test", 0) == dataset(binary, "test", "it")


@pytest.fixture
def copied(binary: Path, tmp_path: Path) -> Path:
    return shutil.copytree(binary, tmp_path / "copied")


def _made_with(*options: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, text: Path) -> None:
        shutil.rmtree(folder)
        preprocess(text, folder, *options)

    return make


def _cut(name: str) -> Callable[[Path, Path], None]:
    def cut(folder: Path, text: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])

    return cut


def _remove(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, text: (folder / name).unlink()


def _other_dictionary(folder: Path, text: Path) -> None:
    for language in ("en", "it"):
        path = folder / f"dict.{language}.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


def _other_side(folder: Path, text: Path) -> None:
    for end in ("bin", "idx"):
        shutil.copy(folder / f"valid.en-it.it.{end}", folder / f"test.en-it.it.{end}")


def _bad_line(folder: Path, text: Path) -> None:
    for language in ("en", "it"):
        with (folder / f"dict.{language}.txt").open("a") as file:
            file.write("word many\n")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (_made_with(), r"dict.en.txt and dict.it.txt differ; preprocess with --joined-dictionary"),
        (
            _made_with("--joined-dictionary", "--dataset-impl", "raw"),
            r"made by fairseq-preprocess --dataset-impl raw; mmap, its default, is needed",
        ),
        (
            _made_with("--joined-dictionary", "--dataset-impl", "cached"),
            r"train.en-it.en.idx is not of fairseq-preprocess --dataset-impl mmap",
        ),
        (_remove("dict.it.txt"), r"there is no dict.it.txt; of dictionaries there are: dict.en.txt \(data.source"),
        (_remove("test.en-it.it.bin"), r"No such file.*test.en-it.it.bin"),
        (_remove("test.en-it.en.idx"), r"there is no test.en-it.en.idx"),
        (_cut("valid.en-it.en.bin"), r"valid.en-it.en.bin and valid.en-it.en.idx do not fit together"),
        (_cut("valid.en-it.en.idx"), r"valid.en-it.en.bin and valid.en-it.en.idx do not fit together"),
        (_other_side, r"as many sentences, but test.en-it.en 7 and test.en-it.it 5"),
        (_other_dictionary, r"train.en-it.en: token \d+ is not in the dictionary of 7"),
        (_bad_line, r"dict.en.txt: line \d+ is not a new symbol and its count"),
    ],
)
def test_other_forms_and_damage_are_refused_in_words(
    spoil: Callable[[Path, Path], None], words: str, copied: Path, text: Path
) -> None:
    spoil(copied, text)
    with pytest.raises(ConfigError, match=rf"data\.path=.*{words}"):
        load_parallel(FairseqBin(path=str(copied)), copied)


# The way back.


def test_fairseqs_translation_task_reads_what_is_exported(tmp_path: Path) -> None:
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    choose = random.Random(1)
    rows = [[" ".join(choose.choices(words, k=choose.randint(6, 9))) for words in _WORDS.values()] for _ in range(900)]
    (tmp_path / "all.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    data = prepare_pairs(ParallelFiles(train=str(tmp_path / "all.tsv"), vocab_size=400), tmp_path / "cache")
    out = tmp_path / "out"
    export_fairseq(data, out)
    config = TranslationConfig(data=str(out), source_lang="en", target_lang="it", dataset_impl=None)
    task = TranslationTask.setup_task(config)
    tokenizer = Tokenizer.from_file(str(data.tokenizer))
    assert task.source_dictionary == task.target_dictionary and len(task.source_dictionary) == data.vocab_size
    assert task.source_dictionary.symbols == [tokenizer.id_to_token(number) for number in range(data.vocab_size)]
    train = data.split("train").tokens
    assert task.source_dictionary.count[4:] == np.bincount(train, minlength=data.vocab_size)[4:].tolist()
    for split in SPLITS:
        task.load_dataset(split)
        pairs = task.dataset(split)
        for side, name in enumerate(("source", "target")):
            assert [pairs[number][name].tolist() for number in range(len(pairs))] == sides(data, split, side)
    with pytest.raises(FileExistsError, match="is there already"):
        export_fairseq(data, out)
    again = prepare_pairs(FairseqBin(path=str(out), bpe="byte_level"), tmp_path / "cache")
    assert [sides(again, "test", side) for side in (0, 1)] == [sides(data, "test", side) for side in (0, 1)]
    assert again.texts("test")[1] == data.texts("test")[1] and again.copies("test") == data.copies("test")


def test_fairseqs_masked_lm_task_reads_what_is_exported(prepared: Prepared, tmp_path: Path) -> None:
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    export_fairseq(prepared, tmp_path / "out")
    config = MaskedLMConfig(
        data=str(tmp_path / "out"), tokens_per_sample=64, sample_break_mode="none", skip_masking=True, seed=0
    )
    task = MaskedLMTask.setup_task(config)
    assert task.mask_idx == 4 and len(task.dictionary) == prepared.vocab_size
    task.load_dataset("valid")
    blocks = task.dataset("valid")
    sequences = [blocks[number]["net_input.src_tokens"].tolist() for number in range(len(blocks))]
    assert [token for sequence in sequences for token in sequence[1:]] == prepared.tokens("valid").tolist()


def test_the_command_exports(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"data.train={text_file}", "data.vocab_size=400", f"paths.cache={tmp_path / 'cache'}"]
    assert sweep.export_corpus("text_files", "fairseq", tmp_path / "out", overrides) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dict.txt", "tokenizer.json", *(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx")),
    }  # fmt: skip
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert sweep.export_corpus("text_files", "fairseq", tmp_path / "out", overrides) == 2
    assert "is there already" in capsys.readouterr().err
    assert sweep.export_corpus("text_files", "marian", tmp_path / "other", overrides) == 2
    assert "--to marian: no such format; known is fairseq" in capsys.readouterr().err
    assert sweep.export_corpus("rotten_tomatoes", "fairseq", tmp_path / "other", []) == 2
    assert "data=rotten_tomatoes: labelled text" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "other").exists()
