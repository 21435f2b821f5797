"""What a compression method works with: task, config and files, the dense model, training and calibration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from train_then_compress.compression.compressed import Compressed
from train_then_compress.config import BudgetConfig, Config
from train_then_compress.config.steps import Distill, Recovery
from train_then_compress.records import RunDirectory, StageKey
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.clock import Clock
from train_then_compress.training.distillation import Distillation
from train_then_compress.training.loop import Desk, Training, fit, validate
from train_then_compress.training.schedule import constant
from train_then_compress.training.task import Quality, Task


@dataclass
class Ledger:
    """What a stage has cost so far: its training, calibration tokens, and a teacher's decoding of targets to learn.

    ``elsewhere``: wall-clock seconds spent on what has a clock (training and decoding) and on evaluation (free).
    """

    clock: Clock = field(default_factory=Clock)
    decoding: Clock = field(default_factory=Clock)
    elsewhere: float = 0.0
    calibration_tokens: int = 0


@dataclass(frozen=True)
class Bench:
    """``dense`` is the dense model's quality on the validation split, ``teacher`` the dense model (not to be changed);
    ``key`` is the stage being worked on, ``ledger`` what it costs."""

    task: Task
    config: Config
    run: RunDirectory
    metrics: MetricsLog
    dense: float
    teacher: nn.Module
    key: StageKey
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def seed(self) -> int:
        """A seed of the stage's own."""
        return int(self.key.id[:7], 16)

    def recover(self, compressed: Compressed, recovery: Recovery, max_steps: int) -> None:
        """Train until the dense quality is back, at most ``max_steps``, pruned weights held at zero.

        Constant rate, a fresh optimizer, batches from a seed of the stage's own. Nothing is trained where the quality
        is there already. With ``recovery.distill`` the dense model teaches.
        """

        def is_back(quality: Quality) -> bool:
            return quality.recovers(self.dense, recovery.target)

        start = time.perf_counter()
        recovered = max_steps == 0 or is_back(validate(compressed.model, self.task, self.config.runtime))
        self.ledger.elsewhere += time.perf_counter() - start
        if recovered:
            return
        model, task = compressed.model, self.task
        if recovery.distill:
            task = Distillation(task, self.teacher, model, Distill(), self.seed)
        self.train(
            model, max_steps, constant(recovery.lr_factor * self.config.optimizer.lr), task=task,
            evaluate_every=recovery.check_every, stop=is_back, after_step=lambda step: compressed.mask_weights(),
        )  # fmt: skip

    def train(
        self, model: nn.Module, steps: int, rate: Callable[[float], float], *, task: Task | None = None,
        evaluate_every: int = 0, stop: Callable[[Quality], bool] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Train ``model`` in place for ``steps`` optimizer steps, once in a stage; ``rate`` is a function of progress.

        ``task``: another than the run's (a distillation, say). ``evaluate_every``: steps between evaluations (0: at
        the end only); ``stop`` and ``after_step`` as in `Training`.
        """
        task = (task or self.task).with_seed(self.seed).counting(model)
        every = evaluate_every or steps
        training = Training(
            budget=BudgetConfig(kind="steps", value=steps),
            optimizer=dataclasses.replace(self.config.optimizer, warmup=0.0),
            rate=rate,
            evaluate_at=[step / steps for step in range(every, steps + 1, every)],
            seed=self.seed,
            stop=stop,
            after_step=after_step,
        )
        checkpoints = Checkpoints(self.run.checkpoints(self.key), self.config.checkpoint.every_seconds)
        start = time.perf_counter()
        with StageProgress(self.key.name, self.run.path.name) as display:
            desk = Desk(self.key.directory, self.config.runtime, checkpoints, self.metrics, display)
            self.ledger.clock = fit(model, task, training, desk).clock
        self.ledger.elsewhere += time.perf_counter() - start

    def calibration(self, batches: int) -> Iterator[Any]:
        """Pieces of so many training batches, drawn by a seed of the stage's own; their tokens are counted."""
        task = self.task.with_seed(self.seed)
        for step in range(batches):
            batch = task.batch(step)
            self.ledger.calibration_tokens += task.counts(batch).tokens
            yield from task.parts(batch, 0, 1, self.config.runtime.micro_batch)
