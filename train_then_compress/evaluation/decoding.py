"""Decoding of translations: beam search, batched, with caches; what every way to decode shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from train_then_compress.data.prepare import BOS, EOS, PAD
from train_then_compress.models.transformer import Translator

#: Never produced. `</s>` ends a translation and, as in fairseq, begins it.
_FORBIDDEN = [BOS, PAD]
#: Scores that are looked at together in the search for the largest.
_CHUNK = 64


@dataclass(frozen=True)
class Decoding:
    """How to decode: ``beam`` 1 is greedy. A translation has at most ``max_ratio`` x source tokens + ``max_extra``, and
    at least one."""

    beam: int = 5
    length_penalty: float = 1.0
    max_ratio: float = 1.5
    max_extra: int = 10

    def room(self, source: Tensor, model: Translator) -> Tensor:
        """The most tokens, without ``</s>``, of each source's translation, int64 [sentences]."""
        longest = (source != PAD).sum(dim=1) * self.max_ratio + self.max_extra
        return longest.long().clamp(1, model.length - 1)


@dataclass(frozen=True)
class Hypothesis:
    """``tokens`` without ``</s>``; ``score``: sum of log-probabilities, ``</s>`` included, over tokens ** penalty."""

    tokens: list[int]
    score: float


@contextmanager
def inference(*models: Translator) -> Iterator[None]:
    """Models in evaluation mode, and nothing recorded for gradients."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)


def precise(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def forbid(gains: Tensor, first: bool) -> None:
    """Rule out, in place, what is never said at a position, [..., vocabulary]; a translation is never empty."""
    gains[..., [*_FORBIDDEN, EOS] if first else _FORBIDDEN] = -torch.inf


def force_end(gains: Tensor, where: Tensor) -> None:
    """Leave, in place, ``</s>`` alone ``where``, a mask of the dimensions before the vocabulary, is true."""
    ends = gains[..., EOS].clone()
    gains.masked_fill_(where[..., None], -torch.inf)
    gains[..., EOS] = ends


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of [.., size], in falling order, and their places, each [.., count]: a faster `topk` for few.

    They are in the ``count`` chunks with the largest maxima.
    """
    chunks = values.shape[-1] // _CHUNK
    if values.shape[-1] % _CHUNK or chunks <= count:
        return values.topk(count, dim=-1)
    pieces = values.reshape(-1, _CHUNK)
    _, chosen = pieces.amax(dim=1).view(-1, chunks).topk(count, dim=1)
    firsts = torch.arange(0, len(pieces), chunks, device=values.device)
    candidates = pieces.index_select(0, (firsts[:, None] + chosen).flatten()).view(len(chosen), -1)
    found, places = candidates.topk(count, dim=1)
    places = chosen.gather(1, places // _CHUNK) * _CHUNK + places % _CHUNK
    return found.view(*values.shape[:-1], count), places.view(*values.shape[:-1], count)


class _Beams:
    """The unfinished sentences of a batch: which they are, their hypotheses' tokens and total log-probabilities."""

    def __init__(self, model: Translator, source: Tensor, decoding: Decoding):
        self.model, self.decoding, self.beam = model, decoding, decoding.beam
        self.memory = model.remember(source)
        sentences = len(source)
        self.cache = model.new_cache(sentences)
        self.numbers = list(range(sentences))
        self.tokens = source.new_full((sentences, 1, 1), EOS)  # one hypothesis at first
        self.totals = precise(self.memory.bias.new_zeros(sentences, 1))
        self.room = decoding.room(source, model)
        self.finished: list[list[Hypothesis]] = [[] for _ in range(sentences)]

    def step(self) -> None:
        """Extend every hypothesis by a token, put aside those that end, drop sentences that have enough."""
        sentences, hypotheses, length = self.tokens.shape  # length: of a translation that ends now, </s> included
        scores, parents, words = self._candidates(length)
        ends = (words == EOS) & scores.isfinite()
        self._put_aside(ends[:, : self.beam], scores, parents, length)
        # Of 2 x beam candidates at most beam end: the best beam of the others go on, in their order. (A beam wider than
        # what can follow has fewer, or some that are worth nothing.)
        going_on = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.beam]
        scores = scores.masked_fill(ends, -torch.inf)
        scores, parents, words = (t.gather(1, going_on) for t in (scores, parents, words))
        every = torch.arange(sentences * hypotheses, device=parents.device)
        rows = every[::hypotheses, None] + parents
        left = [
            i for i, (number, room) in enumerate(zip(self.numbers, self.room.tolist(), strict=True))
            if len(self.finished[number]) < self.beam and length <= room
        ]  # fmt: skip
        self.numbers = [self.numbers[i] for i in left]
        if not left:
            return
        if len(left) < sentences:
            chosen = torch.tensor(left, dtype=torch.int64, device=rows.device)
            rows, words, scores, self.room = (t.index_select(0, chosen) for t in (rows, words, scores, self.room))
            self.memory = self.memory.select(chosen)
        if not torch.equal(rows.flatten(), every):
            self.cache.select(rows.flatten())
        past = self.tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, length)
        self.tokens = torch.cat([past, words[:, :, None]], dim=2)
        self.totals = scores

    def _candidates(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best 2 x beam continuations of each sentence: total log-probability, hypothesis, token; each
        [sentences, 2 x beam], best first."""
        gains = precise(self.model.step(self.tokens[:, :, -1], self.memory, self.cache)).log_softmax(dim=2)
        forbid(gains, first=length == 1)
        if bool((must_end := length > self.room).any()):
            force_end(gains, must_end[:, None])
        # The best 2 x beam of a sentence are among the best 2 x beam of each of its hypotheses.
        best, words = largest(gains, min(2 * self.beam, gains.shape[2] - len(_FORBIDDEN)))
        totals = self.totals[:, :, None] + best
        _, hypotheses, width = words.shape
        scores, places = totals.flatten(1).topk(min(2 * self.beam, hypotheses * width), dim=1)
        return scores, places // width, words.flatten(1).gather(1, places)

    def _put_aside(self, ends: Tensor, scores: Tensor, parents: Tensor, length: int) -> None:
        for i, column in ends.nonzero().tolist():
            found = self.finished[self.numbers[i]]
            if len(found) < self.beam:
                tokens = self.tokens[i, parents[i, column], 1:].tolist()
                found.append(Hypothesis(tokens, float(scores[i, column]) / length**self.decoding.length_penalty))


def beam_search(model: Translator, source: Tensor, decoding: Decoding) -> list[list[Hypothesis]]:
    """Up to ``beam`` translations of each source, int64 [sentences, length] padded at the end; the best first.

    A sentence is finished once ``beam`` hypotheses have ended while they were among its best ``beam``, or at its
    greatest length (fairseq's SequenceGenerator); it then leaves the batch.
    """
    with inference(model):
        beams = _Beams(model, source, decoding)
        while beams.numbers:
            beams.step()
    return [best_first(found) for found in beams.finished]


def best_first(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
    """Sorted by score; of equals the one that was found first."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)
