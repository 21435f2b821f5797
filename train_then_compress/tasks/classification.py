"""Classification of texts or pairs of texts: finetuning a pretrained encoder (Liu et al. 2019, section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config import ClassificationTask as TaskSettings
from train_then_compress.config import Config, LabelledConfig, RobertaConfig
from train_then_compress.config.base import reject
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.examples import Labelled, LabelledBatch, LabelledBatches, batch_of
from train_then_compress.data.prepare import PAD
from train_then_compress.evaluation.predictions import prediction_facts, prediction_sums
from train_then_compress.models.early_exit import EarlyExitClassifier
from train_then_compress.models.roberta import Classifier
from train_then_compress.tasks.base import ConfiguredTask
from train_then_compress.training import parallel
from train_then_compress.training.task import Counts, Quality


@dataclass(frozen=True)
class Part:
    """``tokens`` [examples, length], ``labels`` [examples]; on the task's device."""

    tokens: Tensor
    labels: Tensor

    @property
    def terms(self) -> int:
        """Number of predictions."""
        return len(self.labels)

    @property
    def terms_each(self) -> Tensor:
        """Number of predictions in each sequence."""
        return torch.ones_like(self.labels)


class ClassificationTask(ConfiguredTask[Classifier]):
    """Batches, loss and evaluation of a classifier on a prepared labelled corpus. Quality is accuracy.

    ``seed`` orders the training batches.
    """

    measure: ClassVar[str] = "accuracy"

    def __init__(self, config: Config, data: Labelled, seed: int):
        assert isinstance(config.data, LabelledConfig) and isinstance(config.task, TaskSettings)
        super().__init__(config)
        self.data, self.vocab_size = data, data.vocab_size
        self.length = config.data.sequence_length
        self._check_length()
        self._splits = {split: data.split(split) for split in ("train", "valid", "test")}
        self._start(seed)

    def _check_length(self) -> None:
        """A learned position table is as long as the sequences of pretraining."""
        longest = self.config.longest
        if longest is not None and self.length > longest:
            raise reject(
                "data.sequence_length", self.length, f"at most {longest}, the learned positions of pretraining"
            )

    def _batches(self, seed: int) -> LabelledBatches:
        return LabelledBatches(self._splits["train"], self.config.optimizer.batch_size, self.length, seed)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every training example is seen once."""
        return len(self._splits["train"]) / self.config.optimizer.batch_size

    def flops_per_token(self, model: nn.Module, nonzero: bool = False) -> float:
        """Forward FLOPs per token of full sequences."""
        flops = forward_flops(model, nonzero)
        return flops.per_token(self.length) + flops.per_prediction / self.length

    def model_of(self, config: Config) -> Classifier:
        """A classifier of some run's shape, for the sequences and labels of this task."""
        assert isinstance(config.model, RobertaConfig) and isinstance(config.task, TaskSettings)
        shape = dataclasses.replace(config.model, dropout=config.task.dropout)
        return Classifier(shape, self.vocab_size, config.longest or self.length, len(self.data.labels))

    def load_origin(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put the encoder of a masked LM's weights into a classifier."""
        prefix = "encoder."
        encoder = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        model.get_submodule("encoder").load_state_dict(encoder)

    def counts(self, batch: LabelledBatch) -> Counts:
        """Training FLOPs over all positions, padding included; tokens without padding."""
        examples, length = batch.tokens.shape
        flops = self._flops.training(batch.tokens.size, length, examples)
        return Counts(flops, int((batch.tokens != PAD).sum()))

    def parts(self, batch: LabelledBatch, rank: int, ranks: int, micro_batch: int) -> Iterator[Part]:
        """The rank's examples in pieces."""
        share = len(batch.tokens) // ranks
        size = micro_batch or share
        for start in range(rank * share, (rank + 1) * share, size):
            yield self._part(LabelledBatch(batch.tokens[start : start + size], batch.labels[start : start + size]))

    def _part(self, batch: LabelledBatch) -> Part:
        return Part(torch.from_numpy(batch.tokens).to(self.device), torch.from_numpy(batch.labels).to(self.device))

    def logits(self, model: nn.Module, part: Part) -> Tensor:
        """[examples, labels]; [exits, examples, labels] where a model with early exits is trained."""
        return model(part.tokens)  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, part: Part) -> tuple[Tensor, int]:
        """Summed cross-entropy over the examples (and over all exits, where there are several), and their number."""
        logits = self.logits(model, part).float()
        labels = part.labels.expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"), part.terms

    def evaluate(self, model: nn.Module, split: str) -> Quality:
        """Quality on a split (its first examples where the config has a limit); the ranks share the work."""
        pieces = self._evaluated(split, parallel.rank(), parallel.ranks())
        sums = prediction_sums(model, (((piece.tokens,), piece.labels) for piece in pieces))
        facts = prediction_facts(*parallel.sum_over_ranks(sums, self.device))
        return Quality("accuracy", facts["accuracy"], higher_is_better=True, facts=facts)

    def _evaluated(self, split: str, rank: int, ranks: int) -> Iterator[Part]:
        """The rank's share of a split, in batches of neighbours in length."""
        numbers, size = self._numbers(split), self.config.evaluation.batch_size
        numbers = numbers[np.argsort(self._splits[split].lengths[numbers], kind="stable")]
        for start in range(rank * size, len(numbers), ranks * size):
            yield self._part(batch_of(self._splits[split], numbers[start : start + size], self.length))

    def _numbers(self, split: str) -> np.ndarray:
        """The examples of a split that are evaluated."""
        evaluation = self.config.evaluation
        limit = evaluation.validation_sequences if split == "valid" else evaluation.test_sequences
        return np.arange(min(limit or len(self._splits[split]), len(self._splits[split])))

    def examples(self, split: str) -> Iterator[Tensor]:
        """The tokens of each evaluated example alone, int64 [1, its length], on the CPU."""
        for number in self._numbers(split):
            yield torch.from_numpy(self._splits[split].row(int(number), self.length)[None].astype(np.int64))

    def average_depth(self, model: EarlyExitClassifier) -> float:
        """Layers that an example of the test split passes before it exits, in the mean."""
        model.eval()
        with torch.inference_mode():
            depths = [model.leave(piece.tokens)[1] for piece in self._evaluated("test", 0, 1)]
        return float(torch.cat(depths).double().mean())
