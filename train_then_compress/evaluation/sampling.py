"""Translations drawn at random, token by token (fairseq's ``--sampling``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train_then_compress.data.prepare import EOS
from train_then_compress.evaluation.decoding import (
    Decoding,
    Hypothesis,
    best_first,
    forbid,
    force_end,
    inference,
    precise,
)
from train_then_compress.models.transformer import Translator


@dataclass(frozen=True)
class Sampling:
    """A token is drawn with its probability at a ``temperature``: from the ``top_k`` likeliest (0: from all), and of
    these from the fewest that together have at least ``top_p`` (Holtzman et al. 2019)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def candidates(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``probabilities`` [rows, vocabulary] those that may be drawn, the likeliest first, zero for others, and
        their tokens."""
        size = probabilities.shape[1]
        likeliest, words = probabilities.topk(min(self.top_k or size, size), dim=1)
        before = likeliest.cumsum(dim=1) - likeliest
        return likeliest.masked_fill((before >= self.top_p) & (before > 0), 0), words

    def draw(self, probabilities: Tensor, generator: torch.Generator) -> Tensor:
        """A token for each row of ``probabilities`` [rows, vocabulary]: int64 [rows]."""
        if not self.top_k and self.top_p >= 1:
            return probabilities.multinomial(1, generator=generator).squeeze(1)
        kept, words = self.candidates(probabilities)
        return words.gather(1, kept.multinomial(1, generator=generator)).squeeze(1)


def sample(
    model: Translator, source: Tensor, decoding: Decoding, sampling: Sampling, generator: torch.Generator
) -> list[list[Hypothesis]]:
    """``beam`` translations drawn for each source, int64 [sentences, length] padded at the end; the best first.

    Scores are made of log-probabilities at the temperature, before anything is ruled out or cut off (as fairseq's are).
    The draws of a sentence depend on the batch that it is in. A finished translation leaves the batch.
    """
    found: list[list[Hypothesis]] = [[] for _ in source]
    with inference(model):
        numbers = torch.arange(len(source), device=source.device).repeat_interleave(decoding.beam)
        memory, cache = model.remember(source).select(numbers), model.new_cache(len(numbers))
        room = decoding.room(source, model)[numbers]
        tokens = source.new_full((len(numbers), 1), EOS)
        totals = precise(memory.bias.new_zeros(len(numbers)))
        while len(numbers):
            length = tokens.shape[1]  # of a translation that ends now, </s> included
            logits = precise(model.step(tokens[:, -1:], memory, cache)[:, 0])
            gains = (logits / sampling.temperature).log_softmax(dim=1)
            forbid(gains, first=length == 1)
            force_end(gains, length > room)
            words = sampling.draw(gains.softmax(dim=1), generator)
            totals = totals + gains.gather(1, words[:, None]).squeeze(1)
            for row in (words == EOS).nonzero().squeeze(1).tolist():
                score = float(totals[row]) / length**decoding.length_penalty
                found[int(numbers[row])].append(Hypothesis(tokens[row, 1:].tolist(), score))
            left = (words != EOS).nonzero().squeeze(1)
            tokens = torch.cat([tokens, words[:, None]], dim=1)
            if len(left) < len(words):
                numbers, room, tokens, totals = (t.index_select(0, left) for t in (numbers, room, tokens, totals))
                memory = memory.select(left)
                cache.select(left)
    return [best_first(hypotheses) for hypotheses in found]
