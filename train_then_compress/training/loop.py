"""`fit`, the only training loop: pretraining, finetuning and recovery after pruning all go through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train_then_compress.config import BudgetConfig, Milestone, OptimizerConfig, RuntimeConfig
from train_then_compress.config.base import reject
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training import interrupt, parallel
from train_then_compress.training.checkpoint import (
    Checkpoints,
    Snapshot,
    optimizer_tensors,
    perplexity_milestone,
    restore_optimizer,
)
from train_then_compress.training.clock import Clock
from train_then_compress.training.schedule import Schedule, crossed
from train_then_compress.training.task import Counts, Quality, Task

_TRAIN_ROWS = [number / 100 for number in range(1, 101)]
_WARM_UP_STEPS = 3


class Diverged(RuntimeError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True)
class Training:
    """What is trained towards: the budget, the optimizer, the rate at each progress, where to evaluate.

    ``stop``: called with each evaluation's quality; true ends the training early.
    ``after_step``: called after every optimizer step with the number of steps done (masks are applied again here).
    """

    budget: BudgetConfig
    optimizer: OptimizerConfig
    rate: Schedule
    evaluate_at: list[float]
    seed: int
    keep_at: list[float] = field(default_factory=list)
    keep_at_perplexity: list[float] = field(default_factory=list)
    start: Snapshot | None = None
    stop: Callable[[Quality], bool] | None = None
    after_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Desk:
    """Where a training runs and what it writes: its stage's name, checkpoints, metric rows and progress display."""

    stage: str
    runtime: RuntimeConfig
    checkpoints: Checkpoints
    metrics: MetricsLog
    display: StageProgress


@dataclass(frozen=True)
class Fitted:
    """How a training ended: the clock, and the last evaluation on the validation split."""

    clock: Clock
    quality: Quality


def fit(model: nn.Module, task: Task, training: Training, desk: Desk) -> Fitted:
    """Train ``model`` in place until the budget is spent, going on from the stage's last whole checkpoint.

    Raises `Diverged` when the loss is not finite, `Interrupted` after a signal (its checkpoint written).
    """
    trainer = Trainer(model, task, training, desk)
    trainer.warm_up()
    trainer.resume()
    quality = None
    while not trainer.done:
        before = trainer.progress
        trainer.step()
        if crossed(training.evaluate_at, before, trainer.progress) or trainer.done:
            quality = trainer.evaluate()
            trainer.keep_for(quality)
            if training.stop is not None and training.stop(quality):
                break
        if crossed(_TRAIN_ROWS, before, trainer.progress):
            trainer.write_row()
        trainer.checkpoint(before)
    return Fitted(trainer.clock, quality or validate(model, task, desk.runtime))


def validate(model: nn.Module, task: Task, runtime: RuntimeConfig) -> Quality:
    """The model's quality on the validation split, computed in the training dtype."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=runtime.dtype == "bf16"):
        return task.evaluate(model, "valid")


class Trainer:
    """The state of one `fit`."""

    def __init__(self, model: nn.Module, task: Task, training: Training, desk: Desk):
        self.model, self.task, self.training, self.desk = model, task, training, desk
        self.device = next(model.parameters()).device
        self.forward: nn.Module = torch.compile(model) if desk.runtime.compile else model  # type: ignore[assignment]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = self._new_optimizer()
        self.clock = Clock()
        self.last_seconds = 0.0
        self.rate = 0.0
        self._window: list[tuple[float, float]] = []
        self._window_clock = self.clock

    @property
    def progress(self) -> float:
        return self.clock.progress(self.training.budget)

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def _new_optimizer(self) -> torch.optim.AdamW:
        """AdamW; weight decay on matrices only, as in RoBERTa's successors (biases and norms are left alone)."""
        config = self.training.optimizer
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)

    def warm_up(self) -> None:
        """Wake allocator and compiler on a batch, then put weights and optimizer back: every real step counts."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        for _ in range(_WARM_UP_STEPS):
            start = time.perf_counter()
            self._update(0, self.task.batch(0), 0.0)
            self.last_seconds = time.perf_counter() - start
        self.model.load_state_dict(kept)
        self.optimizer = self._new_optimizer()
        self._budget_is_enough()

    def _budget_is_enough(self) -> None:
        budget, warmup = self.training.budget, self.training.optimizer.warmup
        share = Clock().after(self.task.counts(self.task.batch(0)), self.last_seconds).progress(budget)
        if share > 1 - warmup:
            raise reject("budget.value", budget.value, f"one step costs {share:.0%} of these {budget.kind}, which "
                         f"leaves nothing after the warm-up (optimizer.warmup={warmup}); give more")  # fmt: skip

    def resume(self) -> None:
        """Go on from the last checkpoint, or from the given start; forget metric rows written after it."""
        snapshot = self.desk.checkpoints.latest() or self.training.start
        if snapshot is not None:
            self.model.load_state_dict(snapshot.model)
            restore_optimizer(self.optimizer, snapshot.optimizer)
            self.clock = self._window_clock = snapshot.clock
        self.desk.metrics.drop_after(self.desk.stage, self.clock.steps if snapshot else -1)

    def step(self) -> None:
        """One optimizer step, timed from before its batch is made until its weights are updated."""
        start = time.perf_counter()
        batch = self.task.batch(self.clock.steps)
        counts = self.task.counts(batch)
        self.rate = self.training.rate(self._middle(counts))
        loss, terms = self._update(self.clock.steps, batch, self.rate)
        if self.training.after_step is not None:
            self.training.after_step(self.clock.steps + 1)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        (self.last_seconds,) = parallel.largest_over_ranks([time.perf_counter() - start], self.device)
        self.clock = self.clock.after(counts, self.last_seconds)
        self._window.append((loss, terms))
        self.desk.display.update(self.progress)

    def _middle(self, counts: Counts) -> float:
        """Progress at the middle of the coming step, so that neither the first nor the last has rate zero.

        A step's seconds are not known beforehand: those of the step before stand in.
        """
        after = self.clock.after(counts, self.last_seconds)
        return (self.progress + after.progress(self.training.budget)) / 2

    def _update(self, step: int, batch: Any, rate: float) -> tuple[float, float]:
        """Gradients of the mean loss over the whole batch, clipped; one AdamW step. Returns summed loss and terms."""
        # Dropout depends on (seed, step, rank) only, so a resumed run needs no generator state.
        seed = (self.training.seed << 32) + step * parallel.ranks() + parallel.rank()
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also looks for every kind of accelerator
        else:
            torch.manual_seed(seed)
        term_sum = 0
        losses: list[Tensor] = []
        for part in self.task.parts(batch, parallel.rank(), parallel.ranks(), self.desk.runtime.micro_batch):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.desk.runtime.dtype == "bf16"):
                loss, terms = self.task.loss(self.forward, part)
            loss.backward()
            losses.append(loss.detach())
            term_sum += terms
        loss_sum = float(torch.stack(losses).sum())
        loss_sum, terms_everywhere = parallel.sum_over_ranks([loss_sum, term_sum], self.device)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        parallel.sum_gradients(gradients)
        norm = float(torch.nn.utils.get_total_norm(gradients)) / terms_everywhere
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            raise Diverged(
                f"{self.desk.stage}: loss or gradient is not finite at step {step} (learning rate {rate:.2e})"
            )
        torch._foreach_mul_(gradients, min(1.0, self.training.optimizer.clip / (norm + 1e-6)) / terms_everywhere)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_sum, terms_everywhere

    def evaluate(self) -> Quality:
        """Validate and write the row."""
        quality = validate(self.model, self.task, self.desk.runtime)
        self._write("validation", quality.facts)
        return quality

    def write_row(self) -> None:
        """The mean training loss since the last row, and the speed."""
        losses, terms = (sum(column) for column in zip(*self._window, strict=True))
        self._write("train", {"loss": losses / terms})
        self._window, self._window_clock = [], self.clock

    def _speed(self) -> float:
        seconds = self.clock.seconds - self._window_clock.seconds
        return (self.clock.tokens - self._window_clock.tokens) / seconds if seconds else 0.0

    def _write(self, split: str, facts: dict[str, float]) -> None:
        row: dict[str, Any] = {
            "stage": self.desk.stage,
            "split": split,
            "progress": self.progress,
            **self.clock.facts(),
        }
        row |= {"lr": self.rate, "tokens_per_second": self._speed(), **facts}
        self.desk.metrics.write(row)
        self.desk.display.listen(row)

    def keep_for(self, quality: Quality) -> None:
        """Keep the first checkpoint that is as good as each perplexity asked for."""
        reached = quality.facts.get("perplexity", math.inf)
        for name in map(perplexity_milestone, filter(lambda p: reached <= p, self.training.keep_at_perplexity)):
            if parallel.rank() == 0 and not self.desk.checkpoints.has(name):
                self._save(name)
        parallel.wait_for_all()

    def _save(self, milestone: Milestone | None) -> None:
        state = Snapshot(self.model.state_dict(), optimizer_tensors(self.optimizer), self.clock, milestone)
        self.desk.checkpoints.save(state)

    def checkpoint(self, before: float) -> None:
        """Save where one is due, at each milestone, and when a signal asks for the end."""
        kept: list[Milestone | None] = [at for at in self.training.keep_at if before < at <= self.progress]
        stop, due = parallel.largest_over_ranks([interrupt.requested(), self.desk.checkpoints.due()], self.device)
        if not (stop or due or kept):
            return
        if parallel.rank() == 0:
            for milestone in kept or [None]:
                self._save(milestone)
        parallel.wait_for_all()
        if stop:
            raise interrupt.Interrupted(
                f"{self.desk.stage} stopped at step {self.clock.steps}; its checkpoint is written"
            )
