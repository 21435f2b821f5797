"""Speculative decoding (Leviathan et al. 2023, greedy): a small model drafts, a large one checks.

What comes out is what the large model alone would say, greedily: a drafted token stands only where it is the large
model's own choice, and the first that is not is replaced by it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train_then_compress.data.prepare import EOS
from train_then_compress.evaluation.decoding import Decoding, Hypothesis, forbid, force_end, inference, precise
from train_then_compress.models.transformer import Translator


class Speculative:
    """Greedy decoding of ``model``, ``draft_length`` tokens a pass drafted by ``draft`` (same vocabulary, at least as
    many positions); of ``decoding`` the beam is not used.

    Counts, over everything decoded so far: tokens ``drafted`` (up to a ``</s>``), those ``accepted``, and ``passes`` of
    each sentence through the large model.
    """

    def __init__(self, model: Translator, draft: Translator, draft_length: int, decoding: Decoding):
        if draft.length < model.length:
            raise ValueError(f"the draft has {draft.length} positions; the model's {model.length} are needed")
        self.model, self.draft, self.draft_length, self.decoding = model, draft, draft_length, decoding
        self.drafted = self.accepted = self.passes = 0

    def count(self, drafted: Tensor, agreed: Tensor) -> None:
        """Note a pass: what was drafted and a mask of what stands of it, each [sentences, count]."""
        said = _until_end(drafted)
        self.drafted += int(said.sum())
        self.accepted += int((agreed * said).sum())
        self.passes += len(drafted)

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that stood."""
        return self.accepted / max(1, self.drafted)

    def __call__(self, source: Tensor) -> list[list[Hypothesis]]:
        """One translation of each source, int64 [sentences, length] padded at the end."""
        with inference(self.model, self.draft):
            sentences = _Sentences(self, source)
            while len(sentences.numbers):
                sentences.advance()
        return sentences.found


class _Sentences:
    """The unfinished sentences of a batch: the first ``lengths`` of their ``tokens``, and both models' caches."""

    def __init__(self, settings: Speculative, source: Tensor):
        self.settings = settings
        self.memory, self.draft_memory = settings.model.remember(source), settings.draft.remember(source)
        self.cache = settings.model.new_ragged_cache(len(source))
        self.draft_cache = settings.draft.new_ragged_cache(len(source))
        self.numbers = torch.arange(len(source), device=source.device)
        self.room = settings.decoding.room(source, settings.model)
        self.tokens = source.new_full((len(source), settings.model.length + 1), EOS)
        self.lengths = source.new_ones(len(source))
        self.totals = precise(self.memory.bias.new_zeros(len(source)))
        self.found: list[list[Hypothesis]] = [[] for _ in source]

    def advance(self) -> None:
        """Draft, check, keep what stands and the large model's next token; sentences that end leave."""
        count = min(self.settings.draft_length, int((self.room - self.lengths).min()) + 1)
        drafted = self._draft(count)
        words, gains = self._check(drafted)
        agreed = (words[:, :count] == drafted).to(torch.int64).cumprod(dim=1)
        self.settings.count(drafted, agreed)
        # Kept: what agrees and the token after it, up to the first </s>.
        kept = F.pad(agreed, (1, 0), value=1) * _until_end(words)
        self.tokens.scatter_(1, _places(self.lengths, count + 1), words)
        self.totals = self.totals + (gains * kept).sum(dim=1)
        before, self.lengths = self.lengths, self.lengths + kept.sum(dim=1)
        if count:  # the draft has read all that it said but its last token
            self.draft_cache.lengths = torch.minimum(before + count - 1, self.lengths - 1)
        self._drop(((words == EOS) & (kept > 0)).any(dim=1))

    def _draft(self, count: int) -> Tensor:
        """The draft's next tokens, int64 [sentences, count]."""
        unread = int((self.lengths - self.draft_cache.lengths).max())
        words = self.tokens.gather(1, _places(self.lengths - unread, unread))
        drafted = [words[:, :0]]
        for number in range(count):
            self.draft_cache.lengths = self.lengths + number - words.shape[1]
            logits = self.settings.draft.step(words, self.draft_memory, self.draft_cache)[:, -1:]
            forbid(logits, first=number == 0 and self._at_start)
            words = logits.argmax(dim=2)
            drafted.append(words)
        return torch.cat(drafted, dim=1)

    def _check(self, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own token after the last one and after each drafted one, and its log-probability: each
        [sentences, count + 1]."""
        places = _places(self.lengths - 1, drafted.shape[1] + 1)
        self.cache.lengths = self.lengths - 1
        words = torch.cat([self.tokens.gather(1, places[:, :1]), drafted], dim=1)
        gains = precise(self.settings.model.step(words, self.memory, self.cache)).log_softmax(dim=2)
        forbid(gains, first=False)
        if self._at_start:
            forbid(gains[:, :1], first=True)
        force_end(gains, places >= self.room[:, None])
        best, words = gains.max(dim=2)
        return words, best

    @property
    def _at_start(self) -> bool:
        return bool(self.lengths[0] == 1)

    def _drop(self, ended: Tensor) -> None:
        """Put aside the sentences that ended, a mask."""
        for row in ended.nonzero().squeeze(1).tolist():
            said = int(self.lengths[row]) - 1  # </s> included
            score = float(self.totals[row]) / said**self.settings.decoding.length_penalty
            self.found[int(self.numbers[row])].append(Hypothesis(self.tokens[row, 1:said].tolist(), score))
        if ended.any():
            left = (~ended).nonzero().squeeze(1)
            state = (self.numbers, self.room, self.tokens, self.lengths, self.totals)
            self.numbers, self.room, self.tokens, self.lengths, self.totals = (t.index_select(0, left) for t in state)
            self.memory, self.draft_memory = self.memory.select(left), self.draft_memory.select(left)
            self.cache.select(left)
            self.draft_cache.select(left)


def _places(start: Tensor, count: int) -> Tensor:
    """So many numbers from each ``start`` on, int64 [sentences, count]."""
    return start[:, None] + torch.arange(count, device=start.device)


def _until_end(words: Tensor) -> Tensor:
    """1 up to the first ``</s>`` of each row, that included, then 0."""
    ends = (words == EOS).to(torch.int64)
    return (ends.cumsum(dim=1) - ends == 0).to(torch.int64)
