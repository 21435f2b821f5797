"""Learning rate and evaluation points as functions of progress."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.config import BudgetConfig, EvaluationConfig, OptimizerConfig
from train_then_compress.training.clock import Clock
from train_then_compress.training.schedule import constant, crossed, evaluation_points, linear_to_zero, schedule
from train_then_compress.training.task import Counts

SHARES = st.floats(0.01, 0.45)


@given(warmup=SHARES, progress=st.floats(0, 1))
def test_linear_is_the_piecewise_line_through_its_corners(warmup: float, progress: float) -> None:
    rate = schedule(OptimizerConfig(lr=0.5, warmup=warmup))
    assert rate(progress) == pytest.approx(np.interp(progress, [0, warmup, 1], [0, 0.5, 0]), abs=1e-9)


@given(progress=st.floats(0, 1))
def test_without_warm_up_it_is_one_line(progress: float) -> None:
    assert linear_to_zero(0.5)(progress) == pytest.approx(np.interp(progress, [0, 1], [0.5, 0]), abs=1e-12)


@given(warmup=SHARES, cooldown=SHARES, progress=st.floats(0, 1))
def test_wsd_is_the_piecewise_line_through_its_corners(warmup: float, cooldown: float, progress: float) -> None:
    rate = schedule(OptimizerConfig(lr=0.5, schedule="wsd", warmup=warmup, cooldown=cooldown))
    expected = np.interp(progress, [0, warmup, 1 - cooldown, 1], [0, 0.5, 0.5, 0])
    assert rate(progress) == pytest.approx(expected, abs=1e-9)


def test_inverse_sqrt_is_fairseqs_where_progress_is_the_share_of_updates() -> None:
    pytest.importorskip("fairseq")
    from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
    from fairseq.optim.lr_scheduler.inverse_square_root_schedule import (
        InverseSquareRootLRScheduleConfig,
        InverseSquareRootSchedule,
    )

    optimizer = FairseqAdam(FairseqAdamConfig(lr=[0.5], adam_betas="(0.9, 0.98)"), [torch.nn.Parameter(torch.zeros(1))])
    theirs = InverseSquareRootSchedule(InverseSquareRootLRScheduleConfig(warmup_updates=40, lr=[0.5]), optimizer)
    ours = schedule(OptimizerConfig(lr=0.5, schedule="inverse_sqrt", warmup=0.04))
    for updates in (0, 1, 17, 39, 40, 41, 500, 1000):
        assert ours(updates / 1000) == pytest.approx(theirs.step_update(updates), rel=1e-12), updates


def test_rate_is_zero_at_and_after_the_end_and_without_warmup_starts_at_the_peak() -> None:
    rate = schedule(OptimizerConfig(lr=0.5, warmup=0))
    assert (rate(0), rate(1), rate(1.2)) == (0.5, 0, 0)
    assert constant(0.1)(0) == constant(0.1)(1) == 0.1


@given(points=st.integers(2, 50), first=st.floats(0.001, 0.5))
def test_evaluation_points_have_one_ratio_and_end_at_one(points: int, first: float) -> None:
    values = evaluation_points(EvaluationConfig(points=points, first=first))
    ratios = np.diff(np.log(values))
    assert len(values) == points and values[0] == pytest.approx(first) and values[-1] == 1.0
    assert ratios == pytest.approx(np.full(points - 1, ratios[0]))


@given(steps=st.integers(1, 300), points=st.integers(1, 30))
def test_steps_cross_every_point_once(steps: int, points: int) -> None:
    values = evaluation_points(EvaluationConfig(points=points))
    hits = sum(crossed([value], step / steps, (step + 1) / steps) for step in range(steps) for value in values)
    assert hits == points


@given(kind=st.sampled_from(["seconds", "flops", "tokens", "steps"]), steps=st.integers(1, 50))
def test_progress_is_the_spent_share_of_the_budget(kind: str, steps: int) -> None:
    clock = Clock()
    for _ in range(steps):
        clock = clock.after(Counts(flops=7e3, tokens=11), seconds=0.25)
    spent = {"seconds": 0.25 * steps, "flops": 7e3 * steps, "tokens": 11 * steps, "steps": steps}[kind]
    assert clock.progress(BudgetConfig(kind=kind, value=100)) == pytest.approx(spent / 100)
