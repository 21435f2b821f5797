"""The budget clock: what training has spent, in every currency at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from train_then_compress.config import BudgetConfig
from train_then_compress.training.task import Counts


@dataclass(frozen=True)
class Clock:
    """Seconds of training steps only (no start-up, evaluation or checkpoint), FLOPs, tokens, optimizer steps."""

    seconds: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    steps: int = 0

    def after(self, counts: Counts, seconds: float) -> Clock:
        """The clock one step later."""
        return Clock(self.seconds + seconds, self.flops + counts.flops, self.tokens + counts.tokens, self.steps + 1)

    def progress(self, budget: BudgetConfig) -> float:
        """Spent / budget; above 1 by the overshoot of the last step."""
        return float(getattr(self, budget.kind)) / budget.value

    def facts(self) -> dict[str, float]:
        """The four numbers under their names."""
        return dataclasses.asdict(self)
