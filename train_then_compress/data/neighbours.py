"""Which examples share a batch of a fixed number of them: neighbours in length."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Neighbours:
    """Endless batches of ``size`` numbers of examples; that of a step depends on (seed, step) only, and every example
    is seen once before any is seen again.

    Examples are shuffled, sorted by length within windows of ``window`` batches, cut into batches, and the batches
    shuffled again: little of one that is padded to its longest is padding. ``lengths`` [examples]; ``kind`` keeps the
    numbers that are drawn apart from those of other kinds of batches with the same seed.
    """

    def __init__(self, lengths: np.ndarray, size: int, window: int, seed: int, kind: int):
        self.lengths, self.size, self.window, self.seed, self.kind = lengths, size, window, seed, kind
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, self.kind])
        count, size = len(self.lengths), self.size
        order = rng.permutation(count)
        order = order[np.lexsort((self.lengths[order], np.arange(count) // (self.window * size)))]
        lead = -epoch * count % size  # the first examples fill up the last batch of the epoch before
        whole = lead + (count - lead) // size * size
        batches = rng.permutation(order[lead:whole].reshape(-1, size))
        return np.concatenate([order[:lead], batches.reshape(-1), order[max(whole, lead) :]])

    def __call__(self, step: int) -> np.ndarray:
        """int64 [size]: the examples of a step's batch."""
        epochs, places = np.divmod(np.arange(step * self.size, (step + 1) * self.size), len(self.lengths))
        return np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])
