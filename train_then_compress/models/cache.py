"""What a decoder keeps between steps: the encoded sources, and keys and values of the target so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What the decoder needs of the encoded sources, computed once: each layer's keys and values, [sentences, heads,
    length, head_size], and ``bias`` [sentences, 1, 1, length], minus infinity at padding."""

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor

    def select(self, sentences: Tensor) -> Memory:
        """That of some of the sentences, int64 [n]; one may be taken more than once."""
        keys, values = ([t.index_select(0, sentences) for t in tensors] for tensors in (self.keys, self.values))
        return Memory(keys, values, self.bias.index_select(0, sentences))


class Cache:
    """Keys and values of the target positions decoded so far, for ``rows`` hypotheses of the same length.

    Stored [position, 2, row, head, head_size] for each layer, which may have any number of heads: a step writes one
    position, and another order of the rows is a copy of what is used, to the place of the copy before it (new memory is
    slow at first). Room doubles when it runs out.
    """

    #: What goes onto the scores, broadcast to [rows, heads, queries, positions], if anything.
    bias: Tensor | None = None

    def __init__(self, rows: int, heads: list[int], head_size: int, like: Tensor):
        self.rows, self.length = rows, 0
        self._stored = [like.new_empty(16, 2, rows, count, head_size) for count in heads]
        self._spare: list[Tensor] = []

    def begin(self, tokens: Tensor) -> Tensor:
        """Make room for ``tokens``, int64 [sentences, hypotheses], one of each row: their position, int64 [1, 1]."""
        self.length += 1
        self._grow()
        return torch.full((1, 1), self.length - 1, device=tokens.device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's ``key`` and ``value`` [rows, heads, 1, head_size]; returns all of them so far, each [rows,
        heads, length, head_size]."""
        stored = self._stored[layer]
        stored[self.length - 1, 0] = key[:, :, 0]
        stored[self.length - 1, 1] = value[:, :, 0]
        return self._used(layer)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [n], in this order; a row may be taken more than once."""
        if not self._spare or len(rows) != self._spare[0].shape[2]:
            self._spare = [old.new_empty(*old.shape[:2], len(rows), *old.shape[3:]) for old in self._stored]
        for old, new in zip(self._stored, self._spare, strict=True):
            torch.index_select(old[: self.length], 2, rows, out=new[: self.length])
        self._stored, self._spare = self._spare, self._stored
        self.rows = len(rows)

    def _grow(self) -> None:
        room = len(self._stored[0])
        if self.length > room:
            self._spare = []
            for layer, old in enumerate(self._stored):
                self._stored[layer] = old.new_empty(max(2 * room, self.length), *old.shape[1:])
                self._stored[layer][:room] = old

    def _used(self, layer: int) -> tuple[Tensor, Tensor]:
        key, value = self._stored[layer][: self.length].permute(1, 2, 3, 0, 4).unbind(0)
        return key, value


class RaggedCache(Cache):
    """Keys and values for hypotheses of different lengths, several positions at a time.

    ``lengths``, int64 [rows], is set from outside: what lies beyond it is not seen and is written over.
    """

    def __init__(self, rows: int, heads: list[int], head_size: int, like: Tensor):
        super().__init__(rows, heads, head_size, like)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)

    def begin(self, tokens: Tensor) -> Tensor:
        """Make room for ``tokens``, int64 [rows, n], from ``lengths`` on: their positions, of that shape."""
        self._positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        before, self.length = self.length, int(self._positions.max()) + 1
        self._grow()
        for stored in self._stored:
            stored[before : self.length] = 0  # shorter rows do not write there, and what is not seen must be a number
        unseen = torch.arange(self.length, device=tokens.device) > self._positions[:, :, None]
        self.bias = self._stored[0].new_zeros(unseen.shape).masked_fill(unseen, -math.inf)[:, None]
        return self._positions

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's ``key`` and ``value`` [rows, heads, n, head_size]; returns all of them so far, each [rows,
        heads, length, head_size]."""
        rows = torch.arange(self.rows, device=key.device)[:, None]
        for place, new in enumerate((key, value)):
            self._stored[layer][self._positions, place, rows] = new.transpose(1, 2)
        return self._used(layer)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [n], in this order."""
        super().select(rows)
        self.lengths = self.lengths[rows]
