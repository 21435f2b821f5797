"""What the training loop asks of a task. Masked LM, classification, translation and distillation all fit this."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor, nn

from train_then_compress.config.parts import reads_target
from train_then_compress.data.prepare import PAD


@dataclass(frozen=True)
class Counts:
    """What training on a batch costs: FLOPs by the task's stated convention, and tokens without padding."""

    flops: float
    tokens: int


@dataclass(frozen=True)
class Quality:
    """The value by which models of a task are compared, and everything else that was measured with it.

    ``signatures`` say in words how, by a column's name (sacreBLEU's).
    """

    name: str
    value: float
    higher_is_better: bool
    facts: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)

    def recovers(self, dense: float, target: float) -> bool:
        """Whether the share ``target`` of the dense value is back (or at most 1/target of it, if lower is better)."""
        return self.value >= target * dense if self.higher_is_better else self.value <= dense / target


def tokens_at(piece: Any, name: str) -> Any:
    """The tokens whose positions a module of this name is given, [sequences, length]; ``piece``: of a batch, or all.

    Padding is among them.
    """
    return piece.target if reads_target(name) else piece.tokens


def text_at(piece: Any, name: str) -> Tensor:
    """bool [sequences, length]: which positions of `tokens_at` are no padding."""
    real: Tensor = tokens_at(piece, name) != PAD
    return real


class Task(Protocol):
    """A source of batches, a loss, and an evaluation.

    A piece of a batch has ``tokens`` [sequences, length], ``terms``, the number of its predictions, and ``terms_each``,
    those of each sequence [sequences]; where there is a decoder, ``target`` [sequences, length]: what that reads.
    """

    def with_seed(self, seed: int) -> Self:
        """The same task with its training batches drawn from another seed."""

    def counting(self, model: nn.Module) -> Self:
        """The same task with FLOPs counted for a model of other shape."""

    def batch(self, step: int) -> Any:
        """The whole batch of a step, the same on every rank and after every resume."""

    def counts(self, batch: Any) -> Counts:
        """What a training step on the whole batch costs."""

    def parts(self, batch: Any, rank: int, ranks: int, micro_batch: int) -> Iterator[Any]:
        """The rank's share of the batch, in pieces of ``micro_batch`` sequences (0: one); on the task's device."""

    def logits(self, model: nn.Module, part: Any) -> Tensor:
        """The model's predictions for a piece, [.., n, kinds]; those of its first ``part.terms`` rows count.

        A model with early exits gives in training those of each exit.
        """

    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, int]:
        """The summed loss over a piece and the number of terms in the sum."""

    def evaluate(self, model: nn.Module, split: str) -> Quality:
        """The model's quality on ``valid`` or ``test``."""
