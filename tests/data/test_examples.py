"""Labelled text: RoBERTa's form, splits without leakage, bad files; no network."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from train_then_compress.config import ConfigError
from train_then_compress.config.labelled import CsvFiles, HubLabelled
from train_then_compress.data.examples import Labelled, LabelledBatches, batch_of, prepare_labelled
from train_then_compress.data.labelled import load_labelled
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, Prepared

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, *rows: str, header: str = "text,label") -> Path:
        path = tmp_path / name
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def prepared_from(path: Path, prepared: Prepared, cache: Path, **more: Any) -> Labelled:
    return prepare_labelled(CsvFiles(train=str(path), **more), prepared.tokenizer, cache)


def numbered(count: int, *, shuffled: int | None = None) -> list[str]:
    rows = [f"the boat number {n} is in the harbour,{n % 3}" for n in range(count)]
    if shuffled is not None:
        random.Random(shuffled).shuffle(rows)
    return rows


WORDS = st.lists(st.sampled_from(["boat", "harbour", "Ada", "finds", "the", "ripe", "pear"]), min_size=1, max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=WORDS, second=st.none() | WORDS, length=st.integers(8, 40))
def test_rows_are_those_of_tokenizers_roberta_processing(
    first: list[str], second: list[str] | None, length: int, prepared: Prepared, tmp_path: Path
) -> None:
    """Special tokens and truncation, pairs too, as the library has them."""
    text, pair = " ".join(first), None if second is None else " ".join(second)
    path = tmp_path / "one.csv"
    path.write_text(f"text,text2,label\n{text},{pair or ''},a\nsomething else,,b\n")
    others = [tmp_path / "valid.csv", tmp_path / "test.csv"]
    for other in others:
        other.write_text(f"text,label\nnothing of this {other.name},a\n")
    data = prepared_from(path, prepared, tmp_path, valid=str(others[0]), test=str(others[1]))
    reference = Tokenizer.from_file(str(prepared.tokenizer))
    reference.post_processor = processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS), add_prefix_space=True)
    reference.enable_truncation(length, strategy="longest_first")
    split = data.split("train")
    assert split.row(split.labels.tolist().index(0), length).tolist() == reference.encode(text, pair).ids


def test_batches_are_padded_at_the_end_to_a_multiple_of_16(prepared: Prepared, tmp_path: Path, write: Write) -> None:
    split = prepared_from(write("a.csv", *numbered(60)), prepared, tmp_path).split("train")
    batch = batch_of(split, np.arange(5), 128)
    assert batch.tokens.shape[1] % 16 == 0
    for number, row in enumerate(batch.tokens):
        ids = split.row(number, 128)
        assert row[: len(ids)].tolist() == ids.tolist() and (row[len(ids) :] == PAD).all()
    assert batch.labels.tolist() == split.labels[:5].tolist()


def test_an_epoch_shows_every_example_once_and_a_step_depends_on_seed_and_step_alone(
    prepared: Prepared, tmp_path: Path, write: Write
) -> None:
    split = prepared_from(write("a.csv", *numbered(60)), prepared, tmp_path).split("train")
    batches = LabelledBatches(split, 8, 128, seed=3)
    steps = -(-2 * len(split) // 8)
    rows = [row[row != PAD].tobytes() for step in range(steps) for row in batches(step).tokens][: 2 * len(split)]
    assert sorted(rows[: len(split)]) == sorted(rows[len(split) :]) and rows[: len(split)] != rows[len(split) :]
    again = LabelledBatches(split, 8, 128, seed=3)
    assert (again(steps - 1).tokens == batches(steps - 1).tokens).all()
    assert LabelledBatches(split, 8, 128, seed=4)(0).labels.tolist() != batches(0).labels.tolist()


def test_the_split_depends_on_the_group_not_on_the_order(prepared: Prepared, tmp_path: Path, write: Write) -> None:
    one = prepared_from(write("a.csv", *numbered(200)), prepared, tmp_path)
    other = prepared_from(write("b.csv", *numbered(200, shuffled=1)), prepared, tmp_path)
    assert one.directory != other.directory and one.id == other.id
    counts = {split: facts["examples"] for split, facts in one.record["splits"].items()}
    assert sum(counts.values()) == 200 and 8 <= counts["valid"] <= 36 and 8 <= counts["test"] <= 36


def test_the_name_of_a_special_token_is_text(prepared: Prepared, tmp_path: Path, write: Write) -> None:
    data = prepared_from(write("tags.csv", *(f"{n} <pad> <mask> </s>,{n % 2}" for n in range(60))), prepared, tmp_path)
    for split in ("train", "valid", "test"):
        for number in range(len(data.split(split))):
            row = data.split(split).row(number, 40)
            assert (row > MASK).sum() == len(row) - 2  # but for <s> at the beginning and </s> at the end


def test_a_text_that_is_held_out_is_not_trained_on(prepared: Prepared, tmp_path: Path, write: Write) -> None:
    train = write("train.csv", *numbered(30), "A  text of Valid ,0")
    valid = write("valid.csv", "a text of valid,0", "another,1", "another,1")
    test = write("test.csv", "boat,2", "a text of valid,2")
    data = prepared_from(train, prepared, tmp_path, valid=str(valid), test=str(test))
    assert {split: facts["examples"] for split, facts in data.record["splits"].items()} == {
        "train": 30, "valid": 2, "test": 1,
    }  # fmt: skip


def test_majority_accuracy_is_that_of_the_commonest_training_label(
    prepared: Prepared, tmp_path: Path, write: Write
) -> None:
    train = write("train.csv", "one,a", "two,a", "three,b")
    held = write("held.csv", "four,a", "five,b", "six,b", "seven,b")
    test = write("test.csv", "eight,a", "nine,b")
    data = prepared_from(train, prepared, tmp_path, valid=str(held), test=str(test))
    assert data.labels == ["a", "b"] and data.record["majority_accuracy"] == {"valid": 0.25, "test": 0.5}


@pytest.mark.parametrize(
    "rows, header, words",
    [
        (["boat,a"], "sentence,label", "data.train=.*a column 'text' is needed"),
        (["boat,a"], "text,class", "a column 'label' is needed"),
        (["boat,a", "net,"], "text,label", "line 3: text and label are needed"),
        (["boat,a,b"], "text,label", "line 2: .*no further field"),
        ([], "text,label", "no rows below the header line"),
        (["boat,a"] * 3, "text,label", "two labels or more are needed"),
    ],
)
def test_a_wrong_csv_file_is_refused_in_words(
    rows: list[str], header: str, words: str, prepared: Prepared, tmp_path: Path, write: Write
) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared_from(write("a.csv", *rows, header=header), prepared, tmp_path)


def test_a_label_that_training_never_shows_is_refused(prepared: Prepared, tmp_path: Path, write: Write) -> None:
    train, valid = write("train.csv", *numbered(90)), write("valid.csv", "a lantern,9")
    with pytest.raises(ConfigError, match=r"labels of the valid split that training never shows: \['9'\]"):
        prepared_from(train, prepared, tmp_path, valid=str(valid))


def test_a_missing_or_binary_csv_file_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train=.*cannot be read: No such file"):
        prepared_from(tmp_path / "nowhere.csv", prepared, tmp_path)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"text,label\n\xff\xfe,a\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prepared_from(binary, prepared, tmp_path)


def test_a_local_dataset_in_the_hubs_form_is_read(prepared: Prepared, tmp_path: Path) -> None:
    """SST-2's and MNLI's columns; rows labelled -1, as in GLUE's tests, are left out."""
    features = datasets.Features(
        {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
         "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])}
    )  # fmt: skip
    rows = {"premise": [f"boat {n}" for n in range(60)], "hypothesis": [f"net {n}" for n in range(60)]}
    train = datasets.Dataset.from_dict(rows | {"label": [n % 4 if n % 4 < 3 else -1 for n in range(60)]}, features)
    folder = tmp_path / "mnli"
    for split in ("train", "validation_matched"):
        (folder / split).mkdir(parents=True)
    train.to_parquet(folder / "train" / "0.parquet")
    train.select(range(8)).to_parquet(folder / "validation_matched" / "0.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: mnli\n  data_files:\n  - split: train\n    path: train/*\n"
        "  - split: validation_matched\n    path: validation_matched/*\n---\n"
    )
    config = HubLabelled(
        path=str(folder), subset="mnli", text="premise", pair="hypothesis", test="validation_matched", valid=None
    )
    data = prepare_labelled(config, prepared.tokenizer, tmp_path)
    assert data.labels == ["contradiction", "entailment", "neutral"]
    assert data.record["splits"]["test"]["examples"] == 6
    assert sum(facts["examples"] for facts in data.record["splits"].values()) == 45
    row = data.split("test").row(0, 64).tolist()
    assert row.count(EOS) == 3 and row[0] == BOS
    with pytest.raises(ConfigError, match=r"data\.pair=second: the dataset's columns are premise, hypothesis, label"):
        load_labelled(dataclasses.replace(config, pair="second"), tmp_path)
