"""Batches for masked language modelling: seeded order, dynamic masks, both functions of (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train_then_compress.config import ConfigError
from train_then_compress.data.neighbours import Neighbours
from train_then_compress.data.packing import packed
from train_then_compress.data.prepare import BOS, MASK, PAD, Prepared

EVALUATION_MASK_RATE = 0.15
#: Evaluation masks come from this seed, whatever the training seed.
_EVALUATION_SEED = 2002_11794
_FIRST_ORDINARY = MASK + 1
#: Training batches among which sequences are sorted by length, and what the length of a batch is a multiple of.
_WINDOW, _MULTIPLE = 100, 8


@dataclass(frozen=True)
class MaskedBatch:
    """``tokens`` int64 [sequences, length] after masking; ``masked`` where the loss is; ``targets`` int64 [masked]."""

    tokens: np.ndarray
    masked: np.ndarray
    targets: np.ndarray


def apply_masks(tokens: np.ndarray, rate: float, vocab_size: int, rng: np.random.Generator) -> MaskedBatch:
    """Choose ``rate`` of each sequence's ordinary tokens: 80 % become ``<mask>``, 10 % a random token, 10 % stay.

    (Devlin et al. 2019, section 3.1.) The number in a sequence is rounded at random, so that the expectation is exact;
    it is at least one where there is an ordinary token.
    """
    ordinary = tokens >= _FIRST_ORDINARY
    available = ordinary.sum(axis=1)
    wanted = np.floor(rate * available + rng.random(len(tokens)))
    wanted = np.clip(wanted, np.minimum(1, available), available)
    order = np.where(ordinary, rng.random(tokens.shape), 2.0).argsort(axis=1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(tokens.shape[1])[None], axis=1)
    masked = rank < wanted[:, None]
    targets = tokens[masked]
    kind = rng.random(len(targets))
    replaced = np.where(kind < 0.8, MASK, targets)
    replaced = np.where((kind >= 0.8) & (kind < 0.9), rng.integers(_FIRST_ORDINARY, vocab_size, len(targets)), replaced)
    result = tokens.copy()
    result[masked] = replaced
    return MaskedBatch(result, masked, targets)


class Sequences:
    """A split cut into sequences of one length.

    ``fraction`` keeps that share of the split's tokens from its start: documents stand in the order of their hashes,
    so this is a random subset of documents, and a smaller fraction is part of a larger one.
    """

    def __init__(self, prepared: Prepared, split: str, length: int, fraction: float = 1.0):
        self.tokens = prepared.tokens(split)
        self.vocab_size = prepared.vocab_size
        self.length = length
        blocks = packed(prepared, split, length)
        self.blocks = blocks[: int(np.searchsorted(blocks[:, 1], fraction * len(self.tokens), side="right"))]
        if not len(self.blocks):
            raise ConfigError(
                f"data.fraction={fraction}: not one sequence of {length} tokens is left in the {split} split"
            )

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [sequences]: tokens of each, ``<s>`` included."""
        lengths: np.ndarray = 1 + self.blocks[:, 1] - self.blocks[:, 0]
        return lengths

    def rows(self, numbers: np.ndarray, length: int | None = None) -> np.ndarray:
        """int64 [len(numbers), length], where no other is given that of the sequences: ``<s>``, the block, padding."""
        rows = np.full((len(numbers), length or self.length), PAD, dtype=np.int64)
        rows[:, 0] = BOS
        for row, (start, end) in zip(rows, self.blocks[numbers], strict=True):
            row[1 : 1 + end - start] = self.tokens[start:end]
        return rows


class TrainingBatches:
    """Endless masked batches of `Neighbours`; the batch of a step depends on (seed, step) only."""

    def __init__(self, sequences: Sequences, batch_size: int, mask_rate: float, seed: int):
        self.sequences, self.mask_rate, self.seed = sequences, mask_rate, seed
        self._numbers = Neighbours(sequences.lengths, batch_size, _WINDOW, seed, kind=1)

    def __call__(self, step: int) -> MaskedBatch:
        """The masked batch of a step, as long as it must be."""
        numbers = self._numbers(step)
        longest = int(self._numbers.lengths[numbers].max())
        rows = self.sequences.rows(numbers, min(longest + -longest % _MULTIPLE, self.sequences.length))
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        return apply_masks(rows, self.mask_rate, self.sequences.vocab_size, rng)


def evaluation_batch(sequences: Sequences, limit: int) -> MaskedBatch:
    """The whole split (its first ``limit`` sequences, 0: all) as one batch with fixed masks at 15 %."""
    count = min(limit or len(sequences), len(sequences))
    rng = np.random.Generator(np.random.Philox(key=[_EVALUATION_SEED, 0]))
    return apply_masks(sequences.rows(np.arange(count)), EVALUATION_MASK_RATE, sequences.vocab_size, rng)
