"""Parallel text: filters, splits without leakage, tokens, batches by tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from train_then_compress.config import ConfigError
from train_then_compress.config.parallel import ParallelFiles, ParallelText
from train_then_compress.data.pairs import PairBatches, PairSplit, batch_of, prepare_pairs, split_pairs
from train_then_compress.data.parallel import Pair, ParallelCorpus
from train_then_compress.data.prepare import EOS, MASK, PAD


def corpus_of(*pairs: Pair, **splits: list[Pair]) -> ParallelCorpus:
    made = {"train": list(pairs), **splits}
    return ParallelCorpus({split: lambda rows=rows: rows for split, rows in made.items()}, {}, "")  # type: ignore[misc]


def numbered(count: int, groups: int = 40) -> list[Pair]:
    return [
        Pair(
            f"this boat number {n} lies in the old harbour",
            f"la barca numero {n} sta nel vecchio porto",
            f"g{n % groups}",
        )
        for n in range(count)
    ]


def splits_of(config: ParallelText, corpus: ParallelCorpus) -> dict[str, list[Pair]]:
    held_out, training = split_pairs(config, corpus)
    return {**held_out, "train": list(training())}


def test_every_pair_is_in_one_split_and_groups_stay_together() -> None:
    rows = numbered(3000, groups=300)
    splits = splits_of(ParallelText(), corpus_of(*rows, *rows[:1000]))
    groups = {split: {pair.group for pair in pairs} for split, pairs in splits.items()}
    assert all(groups.values()) and not groups["train"] & (groups["valid"] | groups["test"])
    assert sum(map(len, splits.values())) == 3000
    again = splits_of(ParallelText(), corpus_of(*reversed(rows)))
    assert {split: set(pairs) for split, pairs in again.items()} == {split: set(p) for split, p in splits.items()}
    assert (again["valid"], again["test"]) == (splits["valid"], splits["test"])


def test_nothing_held_out_is_in_training_not_even_in_part() -> None:
    start = "a sentence that is quite long and begins in the very same way as another one does"
    held = [Pair("The boat IS here now, friends!", "La barca", "v"), Pair(f"{start} here", "qualcosa di breve", "v")]
    train = [
        Pair("the boat is - here now friends", "un altro testo ancora", "t1"),  # the same source but for case and signs
        Pair("yet another source of words", "la barca", "t2"),  # the same target
        Pair(f"{start} elsewhere", "tutto un altro testo", "t3"),  # the same beginning
        Pair("a boat of its own", "una barca tutta sua", "t4"),
    ]
    config = ParallelText(min_words=1, max_ratio=100)
    splits = splits_of(config, corpus_of(*train, valid=held, test=[Pair("one test only", "un solo test", "x")]))
    assert [pair.group for pair in splits["train"]] == ["t4"] and len(splits["valid"]) == 2


def plain(text: str) -> str:
    """Words in lower case without signs, in another way than the package."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


LONG = "An old red ship with seven sails lies in the small harbour of this town since june"
# Few texts, so that they meet again: short ones, and long ones that begin alike in just under or over 60 characters.
SIDE = st.lists(st.sampled_from(["boat,", "Boat", "(the)", "in_the-", "été"]), max_size=2).map("  ".join) | st.builds(
    "{}{}".format, st.integers(57, 64).map(lambda end: LONG[:end]), st.sampled_from([" x", " y", "!", ""])
)
ROWS = st.lists(st.tuples(SIDE, SIDE, st.sampled_from("abcdefghij")), max_size=30)


@given(ROWS, ROWS | st.none(), ROWS | st.none())
def test_no_leakage_whatever_the_text(train: list[Any], valid: list[Any] | None, test: list[Any] | None) -> None:
    given_splits = {"valid": valid, "test": test}
    corpus = corpus_of(*(Pair(*row) for row in train), **{
        split: [Pair(*row) for row in rows] for split, rows in given_splits.items() if rows is not None
    })  # fmt: skip
    config = ParallelText(min_words=1, max_words=20)
    splits = splits_of(config, corpus)
    held_out = splits["valid"] + splits["test"]
    for side in range(2):
        held = [plain(pair[side]) for pair in held_out]
        beginnings = {text[:60] for text in held if len(text) >= 60}
        for pair in splits["train"]:
            assert plain(pair[side]) not in held and plain(pair[side])[:60] not in beginnings
    assert len({pair[:2] for pair in splits["train"]}) == len(splits["train"])
    for split, rows in given_splits.items():
        if rows is not None:
            whole = [(" ".join(one.split()), " ".join(other.split())) for one, other, _ in rows]
            assert [pair[:2] for pair in splits[split]] == [sides for sides in whole if all(sides)]
    for pair in splits["train"]:
        one, other = (len(side.split()) for side in pair[:2])
        assert min(one, other) >= 1 and max(one, other) <= 20 and one < 2 * other and other < 2 * one


@pytest.mark.parametrize(
    "source, target, kept",
    [("one two", "uno due tre", False), ("one two three", "uno due tre", True), ("a b c", "a b c d e f", False),
     ("a b c", "a b c d e", True), ("w " * 61, "w " * 61, False), ("w " * 60, "w " * 60, True)],
)  # fmt: skip
def test_short_long_and_unequal_pairs_are_left_out(source: str, target: str, kept: bool) -> None:
    held = {"valid": [Pair("v v v", "v v v", "v")], "test": [Pair("t t t", "t t t", "t")]}
    splits = splits_of(ParallelText(), corpus_of(Pair(source, target, "g"), **held))
    assert len(splits["train"]) == kept


def test_a_group_gives_few_held_out_pairs_and_whole_sentences_only() -> None:
    groups = [f"g{n}" for n in range(200)]
    pairs = [
        Pair(f"{group} has sentence {n} with words.", f"{group} ha la frase {n} qui.", group)
        for group in groups
        for n in range(30)
    ]
    pairs += [Pair(f"{group} short one.", f"{group} breve frase.", group) for group in groups]
    pairs += [Pair(f"title of {group} with many words", f"titolo di {group} con parole", group) for group in groups]
    splits = splits_of(ParallelText(), dataclasses.replace(corpus_of(*pairs), punctuated=True))
    for split in ("valid", "test"):
        counts = np.unique([pair.group for pair in splits[split]], return_counts=True)[1]
        assert len(counts) and counts.max() == 15
        assert all(len(pair.source.split()) >= 6 and pair.source.endswith(".") for pair in splits[split])
        assert not {pair.group for pair in splits[split]} & {pair.group for pair in splits["train"]}


def test_pairs_become_tokens_and_back(tmp_path: Path) -> None:
    rows = [*numbered(600, groups=600), Pair("what does <s> say to </s> here", "che cosa dice <pad> a <unk>", "")]
    for side, language in enumerate(("en", "it")):
        (tmp_path / f"all.{language}").write_text("".join(pair[side] + "\n" for pair in rows))
    data = prepare_pairs(ParallelFiles(train=str(tmp_path / "all"), vocab_size=400), tmp_path / "cache")
    decoder = Tokenizer.from_file(str(data.tokenizer))
    seen = set()
    for split in ("train", "valid", "test"):
        pairs = data.split(split)
        sides = [tuple(decoder.decode(side.tolist(), skip_special_tokens=False).strip() for side in pairs.sides(number))
                 for number in range(len(pairs))]  # fmt: skip
        assert len(sides) == data.record["splits"][split]["pairs"] > 0 and not seen & set(sides)
        assert data.record["splits"][split]["tokens"] == (pairs.lengths - 1).sum() == len(pairs.tokens)
        if split != "train":
            sources, references = data.texts(split)
            assert sides == list(zip(sources, references, strict=True)) and data.copies(split) == sources
        seen |= set(sides)
        assert pairs.tokens.min() > MASK  # the name of a special token is text like any other
    assert seen == {pair[:2] for pair in rows}


def test_a_split_without_pairs_is_refused(tmp_path: Path) -> None:
    for side, language in enumerate(("en", "it")):
        (tmp_path / f"all.{language}").write_text("".join(pair[side] + "\n" for pair in numbered(3)))
    with pytest.raises(ConfigError, match=r"data=parallel_files: no pair fell into the (valid|test) split"):
        prepare_pairs(ParallelFiles(train=str(tmp_path / "all"), vocab_size=400), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tokens"))


def split_of(lengths: list[tuple[int, int]]) -> PairSplit:
    """Pairs of given lengths (without </s>), their tokens numbered through."""
    ends = np.cumsum(np.array(lengths).flatten()).reshape(-1, 2)
    return PairSplit(np.arange(10, 10 + ends[-1, 1]) % 1000 + 10, ends)


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=80)


@settings(max_examples=40)
@given(LENGTHS, st.integers(42, 200), st.integers(0, 9))
def test_an_epoch_shows_every_pair_once_within_the_budget(
    lengths: list[tuple[int, int]], tokens: int, seed: int
) -> None:
    split = split_of(lengths)
    batches = PairBatches(split, tokens, seed)
    seen: list[Any] = []
    sizes: list[int] = []
    step = 0
    while len(seen) < 2 * len(split):
        batch = batches(step)
        assert batch.source.size + batch.target.size <= tokens
        seen += [row[row != PAD].tobytes() for row in np.concatenate([batch.source, batch.labels], axis=1)]
        sizes.append(len(batch.source))
        step += 1
    assert sum(size > 8 and size % 8 > 0 for size in sizes) <= 2, "only what is left of an epoch has another size"
    assert len(seen) == 2 * len(split) and sorted(seen[: len(split)]) == sorted(seen[len(split) :])
    fresh = PairBatches(split, tokens, seed)(step - 1)
    assert (fresh.source == batches(step - 1).source).all()


def test_the_decoder_reads_what_it_is_to_say_one_place_later() -> None:
    split = split_of([(2, 3), (4, 1)])
    batch = batch_of(split, np.array([0, 1]))
    assert batch.source.shape == (2, 5) and batch.target.shape == batch.labels.shape == (2, 4)
    assert batch.target[0].tolist() == [EOS, *split.sides(0)[1]] and batch.labels[0].tolist() == [
        *split.sides(0)[1],
        EOS,
    ]
    assert batch.target[1].tolist() == [EOS, *split.sides(1)[1], PAD, PAD]


def test_little_is_padding_on_lengths_like_those_of_text() -> None:
    rng = np.random.default_rng(0)
    source = rng.geometric(0.06, 4000) + 2
    target = np.maximum(1, source + rng.integers(-3, 4, 4000))
    batches = PairBatches(split_of(list(zip(source.tolist(), target.tolist(), strict=True))), 2000, 0)
    made = [batches(step) for step in range(50)]
    places = sum(batch.source.size + batch.target.size for batch in made)
    assert sum(int((array == PAD).sum()) for batch in made for array in (batch.source, batch.labels)) < 0.1 * places


def test_a_pair_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.batch_tokens=10: the longest pair alone has 12 tokens"):
        PairBatches(split_of([(5, 5)]), 10, 0)
