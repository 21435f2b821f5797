"""Masking: how much, with what, and that it depends on (seed, step) alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.config import ConfigError
from train_then_compress.data.masked import MaskedBatch, Sequences, TrainingBatches, apply_masks, evaluation_batch
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, UNK, Prepared

SPECIAL = [BOS, PAD, EOS, UNK, MASK]
VOCABULARY = 400


def original(batch: MaskedBatch) -> np.ndarray:
    """The tokens before they were masked."""
    tokens = batch.tokens.copy()
    tokens[batch.masked] = batch.targets
    return tokens


def assert_binomial(count: int, trials: int, probability: float) -> None:
    """Within five standard deviations: a right generator fails once in a million."""
    assert abs(count - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability))


@given(
    st.integers(1, 6), st.integers(2, 40), st.floats(0.15, 0.9), st.integers(0, 2**32), st.floats(0, 1),
)  # fmt: skip
def test_counts_and_what_is_never_touched(rows: int, length: int, rate: float, seed: int, special: float) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(MASK + 1, VOCABULARY, (rows, length))
    tokens = np.where(rng.random(tokens.shape) < special, rng.choice(SPECIAL, tokens.shape), tokens)
    before = tokens.copy()
    batch = apply_masks(tokens, rate, VOCABULARY, rng)
    assert np.array_equal(tokens, before) and np.array_equal(original(batch), before)
    assert not np.isin(batch.targets, SPECIAL).any()
    assert ((batch.tokens == before) | batch.masked).all()
    assert set(np.unique(batch.tokens[batch.masked])) <= {MASK, *range(MASK + 1, VOCABULARY)}
    available = (before > MASK).sum(axis=1)
    for count, there in zip(batch.masked.sum(axis=1), available, strict=True):
        low, high = math.floor(rate * there), math.floor(rate * there) + 1
        assert min(1, there) <= count <= there and (low <= count <= high or count == 1)


@pytest.mark.parametrize("rate", [0.15, 0.3])
@pytest.mark.parametrize("available", [3, 10, 126])
def test_the_expected_number_is_exact(rate: float, available: int) -> None:
    rng = np.random.default_rng(0)
    tokens = np.full((20_000, available + 2), PAD)
    tokens[:, 1 : available + 1] = MASK + 1
    counts = apply_masks(tokens, rate, VOCABULARY, rng).masked.sum(axis=1)
    floor = math.floor(rate * available)
    if floor == 0:  # at least one
        assert (counts == 1).all()
    else:
        assert set(counts) <= {floor, floor + 1}
        assert_binomial(int((counts == floor + 1).sum()), len(counts), rate * available - floor)


def test_eighty_ten_ten() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(MASK + 1, VOCABULARY, (10_000, 128))
    batch = apply_masks(tokens, 0.15, VOCABULARY, rng)
    after = batch.tokens[batch.masked]
    total, ordinary = len(after), VOCABULARY - MASK - 1
    assert total > 180_000
    assert_binomial(int((after == MASK).sum()), total, 0.8)
    assert_binomial(int((after == batch.targets).sum()), total, 0.1 + 0.1 / ordinary)
    swapped = after[(after != MASK) & (after != batch.targets)]
    assert_binomial(len(swapped), total, 0.1 * (1 - 1 / ordinary))
    assert swapped.min() > MASK and swapped.max() == VOCABULARY - 1
    assert_binomial(int((swapped < MASK + 1 + ordinary // 2).sum()), len(swapped), (ordinary // 2) / ordinary)
    assert_binomial(int(batch.masked[:, :64].sum()), int(batch.masked.sum()), 0.5)  # every place alike


@given(st.integers(0, 2**31 - 1), st.integers(0, 10_000))
def test_a_batch_depends_on_seed_and_step_alone(prepared: Prepared, seed: int, step: int) -> None:
    sequences = Sequences(prepared, "train", 32)
    fresh = TrainingBatches(sequences, 8, 0.15, seed)(step)
    used = TrainingBatches(Sequences(prepared, "train", 32), 8, 0.15, seed)
    for earlier in (step + 3, 0, step + 1000):
        used(earlier)
    again = used(step)
    assert all(np.array_equal(getattr(fresh, name), getattr(again, name)) for name in ("tokens", "masked", "targets"))
    for other in (TrainingBatches(sequences, 8, 0.15, seed + 1)(step), used(step + 1)):
        assert not np.array_equal(other.masked, fresh.masked)


@pytest.mark.parametrize("batch_size", [1, 8, 30])
def test_every_sequence_is_seen_once_an_epoch_and_masked_anew_each_time(prepared: Prepared, batch_size: int) -> None:
    sequences = Sequences(prepared, "train", 64)
    whole = Counter(row.tobytes() for row in sequences.rows(np.arange(len(sequences))))
    batches = TrainingBatches(sequences, batch_size, 0.15, seed=3)
    rows, masks = [], []
    for step in range(math.ceil(2 * len(sequences) / batch_size)):
        batch = batches(step)
        beyond = (0, 0), (0, 64 - batch.tokens.shape[1])
        rows += [row.tobytes() for row in np.pad(original(batch), beyond, constant_values=PAD)]
        masks += list(np.pad(batch.masked, beyond))
    first, second = rows[: len(sequences)], rows[len(sequences) : 2 * len(sequences)]
    assert Counter(first) == Counter(second) == whole and first != second
    same = sum(np.array_equal(masks[rows.index(row)], masks[len(sequences) + second.index(row)]) for row in second)
    assert same < len(sequences) / 10


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_batch_is_as_long_as_it_must_be_and_hardly_padded(prepared: Prepared, batch_size: int) -> None:
    """Of three epochs, all but the batches in which one goes over into the next."""
    sequences = Sequences(prepared, "train", 64)
    batches = TrainingBatches(sequences, batch_size, 0.15, seed=5)
    assert (sequences.lengths == (sequences.rows(np.arange(len(sequences))) != PAD).sum(axis=1)).all()
    steps = range(3 * len(sequences) // batch_size)
    whole = [step for step in steps if step * batch_size % len(sequences) <= len(sequences) - batch_size]
    assert len(steps) - 3 <= len(whole) < len(steps) or len(sequences) % batch_size == 0
    tokens = [original(batches(step)) for step in whole]
    longest = [int((batch != PAD).sum(axis=1).max()) for batch in tokens]
    assert [batch.shape[1] for batch in tokens] == [min(-(-length // 8) * 8, 64) for length in longest]
    assert len({batch.shape[1] for batch in tokens}) > 1 and longest != sorted(longest)
    # Of random batches a fifth is padding here: sentences are short, but a block ends with one.
    padding = 1 - sum((batch != PAD).sum() for batch in tokens) / sum(batch.size for batch in tokens)
    assert padding < 0.08


def test_rows_are_blocks_between_begin_and_padding(prepared: Prepared) -> None:
    sequences = Sequences(prepared, "valid", 32)
    rows = sequences.rows(np.arange(len(sequences)))
    assert rows.shape == (len(sequences), 32) and rows.dtype == np.int64 and (rows[:, 0] == BOS).all()
    tokens = prepared.tokens("valid")
    for row, (start, end) in zip(rows, sequences.blocks, strict=True):
        assert np.array_equal(row[1 : 1 + end - start], tokens[start:end]) and (row[1 + end - start :] == PAD).all()


def test_evaluation_masks_are_fixed_at_fifteen_per_cent(prepared: Prepared) -> None:
    first = evaluation_batch(Sequences(prepared, "valid", 32), 0)
    np.random.seed(99)
    second = evaluation_batch(Sequences(prepared, "valid", 32), 0)
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "masked", "targets"))
    tokens = original(first)
    assert len(tokens) == len(Sequences(prepared, "valid", 32))
    ordinary = int((tokens > MASK).sum())
    assert abs(len(first.targets) / ordinary - 0.15) < 0.03
    few = evaluation_batch(Sequences(prepared, "valid", 32), 5)
    assert np.array_equal(original(few), tokens[:5])
    assert len(evaluation_batch(Sequences(prepared, "valid", 32), 10**6).tokens) == len(tokens)


@given(st.floats(0.02, 1), st.floats(0.02, 1))
def test_a_smaller_fraction_is_part_of_a_larger_one(prepared: Prepared, a: float, b: float) -> None:
    small, large = (Sequences(prepared, "train", 32, fraction) for fraction in sorted((a, b)))
    assert np.array_equal(large.blocks[: len(small)], small.blocks)
    total = len(small.tokens)
    assert small.blocks[-1, 1] <= min(a, b) * total < small.blocks[-1, 1] + 2 * 32 or min(a, b) == 1
    assert len(Sequences(prepared, "train", 32, 1.0)) >= len(large)


def test_a_fraction_without_a_sequence_is_refused_by_name(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"data\.fraction=1e-06: not one sequence of 32 tokens is left in the train"):
        Sequences(prepared, "train", 32, 1e-6)
    assert len(Sequences(prepared, "train", 32, 0.01)) >= 1
