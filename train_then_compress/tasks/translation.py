"""Translation as a task."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from train_then_compress.config import Config, TransformerConfig
from train_then_compress.config import TranslationTask as TaskSettings
from train_then_compress.config.base import reject
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.pairs import PairBatch, PairBatches, Pairs, PairSplit, batch_of
from train_then_compress.data.prepare import PAD, SPLITS
from train_then_compress.evaluation.bleu import score
from train_then_compress.evaluation.decoding import Decoding
from train_then_compress.evaluation.predictions import fill_up, perplexity, prediction_facts, prediction_sums
from train_then_compress.evaluation.translation import translate
from train_then_compress.models.transformer import Translator
from train_then_compress.tasks.base import ConfiguredTask
from train_then_compress.training import parallel
from train_then_compress.training.cross_entropy import cross_entropy
from train_then_compress.training.task import Counts, Quality

#: Source positions decoded in one batch.
DECODED_AT_ONCE = 4096


@dataclass(frozen=True)
class Part:
    """``source`` [pairs, length], ``target``, what the decoder reads [pairs, length], ``where`` int64 [n] into it,
    flattened, ``targets`` int64 [n]; on the task's device.

    ``where`` and ``targets`` end with places that only fill them up: position 0 and `IGNORED`; ``terms`` are true.
    """

    source: Tensor
    target: Tensor
    where: Tensor
    targets: Tensor
    terms: int

    @property
    def tokens(self) -> Tensor:
        """The source."""
        return self.source

    @property
    def terms_each(self) -> Tensor:
        """Number of predictions in each pair."""
        return torch.bincount(self.where[: self.terms] // self.target.shape[1], minlength=len(self.target))


class TranslationTask(ConfiguredTask[Translator]):
    """Batches, loss and evaluation of a translator on a prepared parallel corpus.

    Quality is sacreBLEU's BLEU; loss (nats per target token, not smoothed, ``</s>`` counted), perplexity and chrF are
    among its facts, and ``bleu_sentences``, the number of sentences that BLEU and chrF are of. ``seed`` orders the
    training batches.
    """

    measure: ClassVar[str] = "bleu"

    def __init__(self, config: Config, pairs: Pairs, seed: int):
        assert isinstance(config.task, TaskSettings)
        super().__init__(config)
        self.pairs, self.vocab_size = pairs, pairs.vocab_size
        self.tokenizer = Tokenizer.from_file(str(pairs.tokenizer))
        self.smoothing = config.task.label_smoothing
        self._splits = {split: pairs.split(split) for split in SPLITS}
        self._check_lengths()
        self._start(seed)

    def _check_lengths(self) -> None:
        assert isinstance(self.config.model, TransformerConfig)
        for split, pairs in self._splits.items():
            longest = int(pairs.lengths.max())
            if longest > self.config.model.length:
                raise reject("model.length", self.config.model.length, f"a sentence of the {split} split has {longest} "
                             "tokens; give more, or take longer ones out of the corpus (data.max_words)")  # fmt: skip

    def _batches(self, seed: int) -> PairBatches:
        return PairBatches(self._splits["train"], self.config.optimizer.batch_tokens, seed)

    def with_training(self, training: PairSplit) -> Self:
        """The same task with other training pairs, once it is given a seed."""
        other = copy.copy(self)
        other._splits = self._splits | {"train": training}
        return other

    def flops_per_token(self, model: nn.Module, nonzero: bool = False) -> float:
        """Forward FLOPs of a test pair of mean length, as in training, for each of its target tokens."""
        source, target = (round(float(mean)) for mean in self._splits["test"].lengths.mean(axis=0))
        return forward_flops(model, nonzero).translating((1, source), (1, target), target) / target

    def model_of(self, config: Config) -> Translator:
        """A translator of some run's shape, for the tokens of this task."""
        assert isinstance(config.model, TransformerConfig)
        return Translator(config.model, self.vocab_size, config.model.length)

    def counts(self, batch: PairBatch) -> Counts:
        """Training FLOPs over all positions, padding included; tokens of both sides without padding."""
        predictions = int((batch.labels != PAD).sum())
        flops = self._flops.training_to_translate(batch.source.shape, batch.target.shape, predictions)
        return Counts(flops, int((batch.source != PAD).sum()) + predictions)

    def parts(self, batch: PairBatch, rank: int, ranks: int, micro_batch: int) -> Iterator[Part]:
        """The rank's pairs in pieces; batches differ in their number of pairs, and the ranks' shares by one."""
        pairs = len(batch.source)
        first, end = (number * pairs // ranks for number in (rank, rank + 1))
        size = micro_batch or max(1, end - first)
        for start in range(first, max(end, first + 1), size):  # one empty piece where there is nothing for a rank
            rows = slice(start, min(start + size, end))
            yield self._part(PairBatch(batch.source[rows], batch.target[rows], batch.labels[rows]))

    def _part(self, batch: PairBatch) -> Part:
        where = np.flatnonzero(batch.labels != PAD)
        targets = batch.labels.flatten()[where]
        arrays = (batch.source, batch.target, *fill_up(where, targets))
        tensors = [torch.from_numpy(array).to(self.device) for array in arrays]
        return Part(tensors[0], tensors[1], tensors[2], tensors[3], len(targets))

    def logits(self, model: nn.Module, part: Part) -> Tensor:
        """[n, vocabulary]: those of the first ``part.terms`` places are predictions, the rest fill up."""
        return model(part.source, part.target, part.where)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, part: Part) -> tuple[Tensor, int]:
        """Summed label-smoothed cross-entropy of the target tokens, and their number."""
        return cross_entropy(self.logits(model, part), part.targets, self.smoothing), part.terms

    def evaluate(self, model: nn.Module, split: str) -> Quality:
        """Quality on a split (its first pairs where the config has a limit); the ranks share the work."""
        evaluation, is_test = self.config.evaluation, split == "test"
        pieces = self._evaluated(split)
        sums = prediction_sums(model, (((part.source, part.target, part.where), part.targets) for part in pieces))
        loss = prediction_facts(*parallel.sum_over_ranks(sums, self.device))["loss"]
        sources, references = (texts[: self._judged(split)] for texts in self.pairs.texts(split))
        decoding = self.decoding(evaluation.beam if is_test else evaluation.validation_beam)
        scores = score(self._translations(model, sources, decoding), references, interval=is_test)
        signatures = {name: scores.pop(name) for name in ("bleu_signature", "chrf_signature")}
        facts = {"loss": loss, "perplexity": perplexity(loss), **scores, "bleu_sentences": len(sources)}
        return Quality("bleu", facts["bleu"], higher_is_better=True, facts=facts, signatures=signatures)

    def copied(self) -> dict[str, dict[str, float]]:
        """BLEU and chrF of the source as its own translation, on the sentences that the model is judged by."""
        found: dict[str, dict[str, float]] = {"copy_bleu": {}, "copy_chrf": {}}
        for split in ("valid", "test"):
            copies, references = self.pairs.copies(split), self.pairs.texts(split)[1]
            scores = score(copies[: self._judged(split)], references[: self._judged(split)])
            for name in ("bleu", "chrf"):
                found[f"copy_{name}"][split] = scores[name]
        return found

    def _pairs(self, split: str) -> int:
        """How many pairs of a split are evaluated."""
        evaluation = self.config.evaluation
        limit = evaluation.test_sequences if split == "test" else evaluation.validation_sequences
        return min(limit or len(self._splits[split]), len(self._splits[split]))

    def _judged(self, split: str) -> int:
        """How many of them are translated."""
        pairs, limit = self._pairs(split), self.config.evaluation.bleu_sentences
        return pairs if split == "test" else min(limit or pairs, pairs)

    def decoding(self, beam: int) -> Decoding:
        """How the config says to decode, with so many hypotheses."""
        evaluation = self.config.evaluation
        return Decoding(beam, evaluation.length_penalty, evaluation.max_ratio, evaluation.max_extra)

    def _evaluated(self, split: str) -> Iterator[Part]:
        """The rank's share of the pairs, in batches of neighbours in length."""
        pairs, size = self._pairs(split), self.config.evaluation.batch_size
        numbers = np.argsort(self._splits[split].lengths[:pairs].sum(axis=1), kind="stable")
        for start in range(parallel.rank() * size, pairs, parallel.ranks() * size):
            yield self._part(batch_of(self._splits[split], numbers[start : start + size]))

    def _translations(self, model: nn.Module, sources: list[str], decoding: Decoding) -> list[str]:
        """Of all sources, on every rank; each rank translates its share."""
        assert isinstance(model, Translator)
        own = translate(model, self.tokenizer, sources[parallel.rank() :: parallel.ranks()], decoding, DECODED_AT_ONCE)
        found = [""] * len(sources)
        for rank, translations in enumerate(parallel.of_all_ranks(own)):
            found[rank :: parallel.ranks()] = translations
        return found
