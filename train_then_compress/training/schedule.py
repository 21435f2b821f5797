"""Learning rate as a function of progress, and the values of progress at which to evaluate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train_then_compress.config import EvaluationConfig, OptimizerConfig

Schedule = Callable[[float], float]


def schedule(config: OptimizerConfig) -> Schedule:
    """The rate at a progress in [0, 1]: zero at 1 for every budget and size.

    But for ``inverse_sqrt`` (Vaswani et al. 2017, equation 3, and fairseq; steps count there, progress here): it ends
    at sqrt(warmup) times the peak, which leaves models short of their best, and is for comparing with fairseq only.
    """
    if config.schedule == "inverse_sqrt":
        return lambda progress: config.lr * min(progress / config.warmup, (config.warmup / max(progress, 1e-9)) ** 0.5)
    start = 1 - config.cooldown if config.schedule == "wsd" else config.warmup

    def rate(progress: float) -> float:
        if progress < config.warmup:
            return config.lr * progress / config.warmup
        if progress <= start:
            return config.lr
        return config.lr * max(0.0, 1 - progress) / (1 - start)

    return rate


def constant(rate: float) -> Schedule:
    """The same rate throughout, for recovery, whose end is not known beforehand."""
    return lambda progress: rate


def linear_to_zero(rate: float) -> Schedule:
    """From ``rate`` at the beginning to zero at the end."""
    return lambda progress: rate * (1 - progress)


def evaluation_points(config: EvaluationConfig) -> list[float]:
    """Values of progress, evenly spaced in their logarithm from ``first`` to 1, which is always among them."""
    if config.points == 1:
        return [1.0]
    points: list[float] = np.geomspace(config.first, 1.0, config.points).tolist()
    return [*points[:-1], 1.0]


def crossed(points: list[float], before: float, after: float) -> bool:
    """Whether a step from one progress to another passed a point; needs no memory, so it survives a resume."""
    return any(before < point <= after for point in points)
