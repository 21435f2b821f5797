"""Prepared corpora: the split, the tokens, the unigram perplexity, and two processes at once."""

from __future__ import annotations

import collections
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from train_then_compress.config import Config, ConfigError, CorpusConfig
from train_then_compress.data.prepare import (
    BOS,
    EOS,
    MASK,
    PAD,
    SPECIAL_TOKENS,
    SPLITS,
    UNK,
    Prepared,
    document_hash,
    prepare,
    sentences,
)  # fmt: skip


def corpus_config(path: Path, **other: Any) -> CorpusConfig:
    data = {"name": "text_files", "train": str(path), "vocab_size": 400, "sequence_length": 32, **other}
    config: CorpusConfig = Config.build({"data": data}).data
    return config


def documents_of(prepared: Prepared, split: str) -> list[str]:
    """The documents of a split, read back from its tokens by hand."""
    tokenizer = Tokenizer.from_file(str(prepared.directory / "tokenizer.json"))
    documents: list[str] = []
    parts: list[str] = []
    sentence: list[int] = []
    for token in prepared.tokens(split).tolist():
        if token != EOS:
            sentence.append(token)
        elif sentence:
            parts.append(tokenizer.decode(sentence).strip())
            sentence = []
        else:
            documents.append(" ".join(parts))
            parts = []
    assert not sentence and not parts
    return documents


def blocks(path: Path) -> list[str]:
    return [" ".join(block.split()) for block in path.read_text().split("\n\n") if block.strip()]


def test_every_document_is_in_one_split_and_none_is_lost(prepared: Prepared, text_file: Path) -> None:
    found = {split: documents_of(prepared, split) for split in SPLITS}
    assert sorted(document for documents in found.values() for document in documents) == sorted(set(blocks(text_file)))
    assert {split: len(documents) for split, documents in found.items()} == {
        split: count["documents"] for split, count in prepared.record["splits"].items()
    }
    for split, documents in found.items():
        assert len(prepared.tokens(split)) == prepared.record["splits"][split]["tokens"] and documents
    assert 0.9 < len(found["train"]) / sum(map(len, found.values())) < 0.99


def test_the_split_is_by_hash_in_hash_order(prepared: Prepared, text_file: Path) -> None:
    texts = {" ".join(block.split()): block.strip() for block in text_file.read_text().split("\n\n")}
    bounds = {"valid": (0, 0.02), "test": (0.02, 0.04), "train": (0.04, 1)}
    for split, (low, high) in bounds.items():
        numbers = [document_hash(texts[document]) / 2**64 for document in documents_of(prepared, split)]
        assert numbers == sorted(numbers) and all(low <= number < high for number in numbers)


def test_the_same_documents_in_another_order_are_the_same_corpus(
    prepared: Prepared, text_file: Path, tmp_path: Path
) -> None:
    texts = text_file.read_text().strip().split("\n\n")
    random.Random(1).shuffle(texts)
    path = tmp_path / "permuted.txt"
    path.write_text("\n\n\n".join(texts))
    permuted = prepare(corpus_config(path), tmp_path / "cache")
    assert permuted.id == prepared.id and permuted.directory.name != prepared.directory.name
    assert permuted.record["splits"] == prepared.record["splits"]


def test_a_document_more_leaves_the_others_where_they_were(prepared: Prepared, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.txt"
    path.write_text("A new document stands first.\n\n" + text_file.read_text())
    more = prepare(corpus_config(path), tmp_path / "cache")
    assert more.id != prepared.id
    for split in SPLITS:
        before, after = set(documents_of(prepared, split)), set(documents_of(more, split))
        assert before <= after and after - before <= {"A new document stands first."}


def test_equal_documents_are_kept_once(prepared: Prepared, text_file: Path, tmp_path: Path) -> None:
    text = text_file.read_text()
    path = tmp_path / "twice.txt"
    path.write_text(text + "\n" + text)
    assert prepare(corpus_config(path), tmp_path / "cache").id == prepared.id


def test_held_out_files_win_over_training_ones(text_file: Path, tmp_path: Path) -> None:
    """A document that stands in two files is scored and not trained on."""
    texts = text_file.read_text().strip().split("\n\n")
    names = {"train": texts[:200], "valid": texts[190:210] + texts[190:195], "test": texts[205:230]}
    for name, part in names.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    files = {name: str(tmp_path / f"{name}.txt") for name in ("valid", "test")}
    prepared = prepare(corpus_config(tmp_path / "train.txt", **files), tmp_path / "cache")
    flat = [" ".join(text.split()) for text in texts]
    expected = {"train": flat[:190], "valid": flat[190:210], "test": flat[210:230]}
    assert {split: sorted(documents_of(prepared, split)) for split in SPLITS} == {
        split: sorted(documents) for split, documents in expected.items()
    }


def test_tokens_are_those_of_the_tokenizer_with_an_end_after_each_sentence(prepared: Prepared) -> None:
    tokenizer = Tokenizer.from_file(str(prepared.directory / "tokenizer.json"))
    assert [tokenizer.id_to_token(number) for number in range(5)] == list(SPECIAL_TOKENS)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [BOS, PAD, EOS, UNK, MASK] == [0, 1, 2, 3, 4]
    assert prepared.vocab_size == tokenizer.get_vocab_size() == 400
    for split in SPLITS:
        tokens = prepared.tokens(split)
        assert tokens.dtype == np.uint16 and tokens.max() < 400 and isinstance(tokens, np.memmap)
        assert not np.isin(tokens, [BOS, PAD, UNK, MASK]).any() and (tokens[-2:] == EOS).all()
        # A sentence ends with its punctuation: never in the middle of a line.
        ends = np.flatnonzero(tokens == EOS)
        before = {tokenizer.decode([int(tokens[end - 1])]).strip() for end in ends if end and tokens[end - 1] != EOS}
        assert before <= {".", "?"} or all(piece.endswith((".", "?")) for piece in before)


def test_any_text_is_encoded_without_loss(prepared: Prepared) -> None:
    tokenizer = Tokenizer.from_file(str(prepared.directory / "tokenizer.json"))
    for text in ("naïve — “quoted” ½", "日本語 and עברית", "\U0001f600 <mask >", "x\ty"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text


def test_the_name_of_a_special_token_is_text(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tags.txt").write_text("Ada pads <pad> and masks <mask> the </s> boat.\n\n" + text_file.read_text())
    prepared = prepare(corpus_config(tmp_path / "tags.txt"), tmp_path)
    assert not any(np.isin(prepared.tokens(split), [BOS, PAD, UNK, MASK]).any() for split in SPLITS)
    found = [document for split in SPLITS for document in documents_of(prepared, split)]
    assert "Ada pads <pad> and masks <mask> the </s> boat." in found


def test_sentences_end_where_one_would_end_them() -> None:
    text = 'He left. She asked "why?" He said 3.5 apples! (Quietly.) then  \n\n  no end here\nE.g. this. That'
    assert sentences(text) == [
        "He left.", 'She asked "why?"', "He said 3.5 apples!", "(Quietly.) then", "no end here", "E.g. this.", "That",
    ]  # fmt: skip


def test_unigram_perplexity_is_that_of_smoothed_counts(prepared: Prepared) -> None:
    counts = {
        split: collections.Counter(token for token in prepared.tokens(split).tolist() if token > MASK)
        for split in SPLITS
    }
    size = max(max(counter) for counter in counts.values()) - MASK  # ordinary tokens that occur at all, by number
    total = sum(counts["train"].values()) + size
    for split in ("valid", "test"):
        nats = sum(-n * math.log((counts["train"][token] + 1) / total) for token, n in counts[split].items())
        expected = math.exp(nats / sum(counts[split].values()))
        assert prepared.record["unigram_perplexity"][split] == pytest.approx(expected, rel=1e-12)
        assert 20 < expected < 400


def test_what_does_not_change_the_tokens_prepares_nothing_again(
    text_file: Path, prepared: Prepared, cache: Path
) -> None:
    written = {path: path.stat().st_mtime_ns for path in prepared.directory.iterdir()}
    again = prepare(corpus_config(text_file, sequence_length=64, fraction=0.5), cache)
    assert again == prepared
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    other = prepare(corpus_config(text_file, vocab_size=300), cache)
    assert other.id != prepared.id and other.directory != prepared.directory and other.vocab_size == 300


def test_two_processes_prepare_at_once(text_file: Path, prepared: Prepared, tmp_path: Path) -> None:
    """Both wait at a starting line, so that neither finds the other's work done."""
    code = (
        "import sys; from pathlib import Path; from train_then_compress.config import Config\n"
        "from train_then_compress.data.prepare import prepare\n"
        "data = Config.build({'data': dict(name='text_files', train=sys.argv[1], vocab_size=400)}).data\n"
        "print('ready', flush=True); input(); print(prepare(data, Path(sys.argv[2])).id)"
    )
    command = [sys.executable, "-c", code, str(text_file), str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].strip() for process in both]
    assert outputs == [prepared.id] * 2 and [process.returncode for process in both] == [0, 0]
    assert sorted(path.suffix for path in (tmp_path / "prepared").iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("content", ["", " \n\n \t\n"])
def test_an_empty_corpus_is_an_error_that_names_the_key(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.train=.*empty\.txt.*text is needed"):
        prepare(corpus_config(path), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/prepared/*/record.json"))


def test_too_few_documents_for_a_split_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("Only one document.\nIt has two lines.")
    with pytest.raises(
        ConfigError, match=r"no document fell into the \w+ split \(1 documents in all\); give more text"
    ):
        prepare(corpus_config(path), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache/prepared").iterdir()] == [".lock"]


def test_a_missing_file_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train=.*nowhere\.txt: no such file"):
        prepare(corpus_config(tmp_path / "nowhere.txt"), tmp_path / "cache")
    assert not (tmp_path / "cache/prepared").exists()
