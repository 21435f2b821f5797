"""Distillation: a task whose loss also asks a student to predict as its teacher does, and by choice to think alike."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from train_then_compress.config import Teaching
from train_then_compress.training.hints import HINTS, STUDENT, TEACHER, Seen, states_of
from train_then_compress.training.task import Counts, Quality, Task

#: Among a student's parameters those of its training alone begin with this.
LENT = "hints."


class Distillation:
    """A task taught by ``teacher``, for a student of the given one's shape.

    ``loss = alpha T^2 KL(teacher || student, softened by T) + (1 - alpha) task + hints``, the KL over the task's
    predictions (Hinton et al. 2015, section 2; T^2 keeps the gradient's size), a sequence's hints counted once for each
    of its predictions, so that pieces of a batch add up. The teacher is left as it is: no gradient, no dropout; it runs
    in the student's precision.
    """

    def __init__(self, task: Task, teacher: nn.Module, student: nn.Module, teaching: Teaching, seed: int):
        self.task, self.teacher, self.teaching = task, teacher, teaching
        self._teachers_task = task.counting(teacher)
        self.hints = HINTS[teaching.hints](student, teacher, teaching)
        self.projections = nn.ParameterDict(self.hints.projections(seed)).to(next(student.parameters()).device)

    @contextmanager
    def lending(self, student: nn.Module) -> Iterator[None]:
        """Give the student, while it is trained, the projections of its hints as parameters of its own, ``hints.*``.

        So they are trained and kept in checkpoints with it, and are no part of what is stored afterwards.
        """
        student.add_module(LENT.removesuffix("."), self.projections)
        try:
            yield
        finally:
            delattr(student, LENT.removesuffix("."))

    def with_seed(self, seed: int) -> Self:
        """The same with training batches drawn from another seed."""
        other = copy.copy(self)
        other.task = self.task.with_seed(seed)
        return other

    def counting(self, model: nn.Module) -> Self:
        """The same with FLOPs counted for a student of other shape."""
        other = copy.copy(self)
        other.task = self.task.counting(model)
        return other

    def batch(self, step: int) -> Any:
        """The task's."""
        return self.task.batch(step)

    def counts(self, batch: Any) -> Counts:
        """What the task's step costs the student, one forward pass of the teacher, and the products in the hints."""
        own, taught = self.task.counts(batch), self._teachers_task.counts(batch)
        return Counts(own.flops + taught.flops / 3 + self.hints.flops(batch), own.tokens)

    def parts(self, batch: Any, rank: int, ranks: int, micro_batch: int) -> Iterator[Any]:
        """The task's."""
        return self.task.parts(batch, rank, ranks, micro_batch)

    def logits(self, model: nn.Module, part: Any) -> Tensor:
        """The student's."""
        return self.task.logits(model, part)

    def loss(self, model: nn.Module, part: Any) -> tuple[Tensor, int]:
        """The summed loss over a piece and the number of the task's predictions in it."""
        taught = self._taught(part)
        if self.teaching.hints != "none":
            model = getattr(model, "_orig_mod", model)  # compiled code would not show its inner states
        with states_of({**self.hints.watched(model, STUDENT), "logits": model}) as seen:
            task_loss, terms = self.task.loss(model, part)
        with torch.autocast(part.tokens.device.type, enabled=False):
            softened = self._divergence(seen.pop("logits")[1], taught["logits"][1], terms)
            each = self.hints.losses(seen, taught, part, self.projections)
            hints = (each * part.terms_each).sum()
        alpha = self.teaching.alpha
        return alpha * softened + (1 - alpha) * task_loss + hints, terms

    def _taught(self, part: Any) -> Seen:
        """What the teacher gives for a piece: its logits and the states that hints are made of."""
        training = self.teacher.training
        self.teacher.eval()
        with states_of({**self.hints.watched(self.teacher, TEACHER), "logits": self.teacher}) as seen, torch.no_grad():
            self.task.logits(self.teacher, part)
        self.teacher.train(training)
        return seen

    def _divergence(self, student: Tensor, teacher: Tensor, terms: int) -> Tensor:
        """T^2 KL, summed over the first ``terms`` predictions (of each exit, where the student has several)."""
        temperature = self.teaching.temperature
        ours = (student[..., :terms, :].float() / temperature).log_softmax(dim=-1)
        theirs = (teacher[:terms].float() / temperature).log_softmax(dim=-1)
        return temperature**2 * (theirs.exp() * (theirs - ours)).sum()

    def evaluate(self, model: nn.Module, split: str) -> Quality:
        """The student's quality at the task."""
        return self.task.evaluate(model, split)
