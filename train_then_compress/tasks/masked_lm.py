"""Masked language modelling as a task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from train_then_compress.config import Config, CorpusConfig, RobertaConfig
from train_then_compress.config import MaskedLMTask as TaskSettings
from train_then_compress.cost.flops import EVALUATION_MASK_RATE, forward_flops
from train_then_compress.data.masked import MaskedBatch, Sequences, TrainingBatches, evaluation_batch
from train_then_compress.data.prepare import PAD, Prepared
from train_then_compress.evaluation.predictions import fill_up, perplexity, prediction_facts, prediction_sums
from train_then_compress.models.roberta import MaskedLM
from train_then_compress.tasks.base import ConfiguredTask
from train_then_compress.training import parallel
from train_then_compress.training.cross_entropy import cross_entropy
from train_then_compress.training.task import Counts, Quality


@dataclass(frozen=True)
class Part:
    """``tokens`` [sequences, length], ``where`` [n] into them, flattened, ``targets`` [n]; on the task's device.

    ``where`` and ``targets`` end with places that only fill them up: position 0 and `IGNORED`; ``terms`` are true.
    """

    tokens: Tensor
    where: Tensor
    targets: Tensor
    terms: int
    padded: bool

    @property
    def terms_each(self) -> Tensor:
        """Number of predictions in each sequence."""
        return torch.bincount(self.where[: self.terms] // self.tokens.shape[1], minlength=len(self.tokens))


class MaskedLMTask(ConfiguredTask[MaskedLM]):
    """Batches, loss and evaluation of a masked LM on a prepared corpus.

    Quality is masked-token accuracy (the value recovery looks at); loss and perplexity are among its facts.
    ``seed`` orders and masks the training batches.
    """

    measure: ClassVar[str] = "accuracy"

    def __init__(self, config: Config, prepared: Prepared, seed: int):
        assert isinstance(config.data, CorpusConfig) and isinstance(config.task, TaskSettings)
        super().__init__(config)
        self.vocab_size, self.mask_rate = prepared.vocab_size, config.task.mask_rate
        self.length = length = config.data.sequence_length
        self._training = Sequences(prepared, "train", length, config.data.fraction)
        self._splits = {split: Sequences(prepared, split, length) for split in ("valid", "test")}
        self._start(seed)

    def _batches(self, seed: int) -> TrainingBatches:
        return TrainingBatches(self._training, self.config.optimizer.batch_size, self.mask_rate, seed)

    def flops_per_token(self, model: nn.Module, nonzero: bool = False) -> float:
        """Forward FLOPs per token of full sequences of which 15 % are predicted, as in evaluation."""
        flops = forward_flops(model, nonzero)
        return flops.per_token(self.length) + EVALUATION_MASK_RATE * flops.per_prediction

    def model_of(self, config: Config) -> MaskedLM:
        """A masked LM of some run's shape, for the sequences of this task."""
        assert isinstance(config.model, RobertaConfig)
        return MaskedLM(config.model, self.vocab_size, config.longest or self.length)

    def counts(self, batch: MaskedBatch) -> Counts:
        """Training FLOPs over all positions, padding included; tokens without padding."""
        flops = self._flops.training(batch.tokens.size, batch.tokens.shape[1], len(batch.targets))
        return Counts(flops, int((batch.tokens != PAD).sum()))

    def parts(self, batch: MaskedBatch, rank: int, ranks: int, micro_batch: int) -> Iterator[Part]:
        """The rank's sequences in pieces."""
        share = len(batch.tokens) // ranks
        size = micro_batch or share
        before = np.concatenate([[0], batch.masked.sum(axis=1).cumsum()])
        for start in range(rank * share, (rank + 1) * share, size):
            yield self._part(batch, slice(start, start + size), before)

    def _part(self, batch: MaskedBatch, rows: slice, before: np.ndarray) -> Part:
        tokens = batch.tokens[rows]
        where = np.flatnonzero(batch.masked[rows])
        targets = batch.targets[before[rows.start] : before[rows.start + len(tokens)]]
        padded = bool((tokens[:, -1] == PAD).any())  # padding stands at the end
        tensors = [torch.from_numpy(array).to(self.device) for array in (tokens, *fill_up(where, targets))]
        return Part(tensors[0], tensors[1], tensors[2], len(targets), padded)

    def logits(self, model: nn.Module, part: Part) -> Tensor:
        """[n, vocabulary]: those of the first ``part.terms`` places are predictions, the rest fill up."""
        return model(part.tokens, part.where, part.padded)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, part: Part) -> tuple[Tensor, int]:
        """Summed cross-entropy at the masked positions, and their number."""
        return cross_entropy(self.logits(model, part), part.targets), part.terms

    def evaluate(self, model: nn.Module, split: str) -> Quality:
        """Quality on fixed 15 % masks; the ranks share the work."""
        evaluation = self.config.evaluation
        limit = evaluation.validation_sequences if split == "valid" else evaluation.test_sequences
        batch = evaluation_batch(self._splits[split], limit)
        before = np.concatenate([[0], batch.masked.sum(axis=1).cumsum()])
        starts = range(
            parallel.rank() * evaluation.batch_size, len(batch.tokens), parallel.ranks() * evaluation.batch_size
        )
        pieces = (self._part(batch, slice(start, start + evaluation.batch_size), before) for start in starts)
        sums = prediction_sums(model, (((piece.tokens, piece.where), piece.targets) for piece in pieces))
        facts = prediction_facts(*parallel.sum_over_ranks(sums, self.device))
        facts["perplexity"] = perplexity(facts["loss"])
        return Quality("accuracy", facts["accuracy"], higher_is_better=True, facts=facts)
