"""What a compression method works with: the task, the run's config and files, and recovery training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from train_then_compress.compression.compressed import Compressed
from train_then_compress.config import BudgetConfig, Config
from train_then_compress.config.steps import Recovery
from train_then_compress.records import RunDirectory, StageKey
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.clock import Clock
from train_then_compress.training.loop import Desk, Training, fit, validate
from train_then_compress.training.schedule import constant
from train_then_compress.training.task import Task


@dataclass(frozen=True)
class Bench:
    """``dense`` is the dense model's quality on the validation split; ``key`` the stage being worked on."""

    task: Task
    config: Config
    run: RunDirectory
    metrics: MetricsLog
    dense: float
    key: StageKey

    def recover(self, compressed: Compressed, recovery: Recovery, max_steps: int) -> Clock:
        """Train until the dense quality is back, at most ``max_steps``, pruned weights held at zero.

        Constant rate, a fresh optimizer, batches from a seed of the stage's own. Nothing is trained where the quality
        is there already.
        """
        config = self.config
        task = self.task.with_seed(int(self.key.id[:7], 16))
        checkpoints = Checkpoints(self.run.checkpoints(self.key), config.checkpoint.every_seconds)
        if max_steps == 0 or self._recovered(compressed, recovery):
            return Clock()
        training = Training(
            budget=BudgetConfig(kind="steps", value=max_steps),
            optimizer=dataclasses.replace(config.optimizer, warmup=0.0),
            rate=constant(recovery.lr_factor * config.optimizer.lr),
            evaluate_at=[step / max_steps for step in range(recovery.check_every, max_steps + 1, recovery.check_every)],
            seed=int(self.key.id[:7], 16),
            stop=lambda quality: quality.recovers(self.dense, recovery.target),
            after_step=compressed.mask_weights,
        )
        with StageProgress(self.key.name, self.run.path.name) as display:
            desk = Desk(self.key.directory, config.runtime, checkpoints, self.metrics, display)
            return fit(compressed.model, task, training, desk).clock

    def _recovered(self, compressed: Compressed, recovery: Recovery) -> bool:
        return validate(compressed.model, self.task, self.config.runtime).recovers(self.dense, recovery.target)
