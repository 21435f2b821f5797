"""The frontier against its definition."""

from __future__ import annotations

import math

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.analysis.frontier import frontier, mean_over_seeds, study_frontier

# Few distinct values, so that ties and twins are common.
values = st.one_of(st.integers(0, 6).map(float), st.just(math.nan), st.just(math.inf), st.floats(0, 6))


def by_definition(points: list[tuple[float, float]], higher_is_better: bool) -> list[bool]:
    """Pair by pair: is there another point that is no worse in both and better in one?"""
    signed = [(cost, -quality if higher_is_better else quality) for cost, quality in points]
    finite = [math.isfinite(cost) and math.isfinite(quality) for cost, quality in points]
    return [
        is_finite
        and not any(
            other_is_finite and other[0] <= point[0] and other[1] <= point[1] and other != point
            for other, other_is_finite in zip(signed, finite, strict=True)
        )
        for point, is_finite in zip(signed, finite, strict=True)
    ]


@given(st.lists(st.tuples(values, values), max_size=40), st.booleans())
def test_frontier_is_what_the_definition_says(points: list[tuple[float, float]], higher_is_better: bool) -> None:
    frame = pd.DataFrame(points, columns=["bytes", "quality"], dtype=float)
    frame.index = frame.index[::-1] + 7
    mask = frontier(frame, "bytes", "quality", higher_is_better)
    assert mask.tolist() == by_definition(points, higher_is_better)
    assert mask.index.equals(frame.index) and mask.dtype == bool


def test_of_equal_cost_only_the_best_is_kept_and_of_twins_both() -> None:
    frame = pd.DataFrame({"bytes": [10, 10, 20, 20, 30], "loss": [3.0, 4.0, 2.0, 2.0, 2.0]})
    assert frontier(frame, "bytes", "loss").tolist() == [True, False, True, True, False]


def rows(*points: tuple[int, int, float, float]) -> pd.DataFrame:
    frame = pd.DataFrame(points, columns=["depth", "seed", "bytes", "loss"])
    return frame.assign(task="mlm", corpus="text", vocab_size=300, budget_kind="steps", budget=10.0, width=8,
                        variant="", recipe="none")  # fmt: skip


def test_seeds_are_judged_by_their_mean() -> None:
    # The best single seed (1.0) belongs to depth 1, whose mean (3.0) loses to depth 2 at equal cost.
    points = rows((1, 0, 10, 1.0), (1, 1, 10, 5.0), (2, 0, 10, 2.5), (2, 1, 10, 2.7))
    assert study_frontier(points, "bytes", "loss").tolist() == [False, False, True, True]
    means = mean_over_seeds(points, ["loss"])
    assert means[["loss", "loss_low", "loss_high", "seeds"]].to_numpy().tolist() == [[3, 1, 5, 2], [2.6, 2.5, 2.7, 2]]


def test_budgets_are_judged_apart() -> None:
    short, long = rows((1, 0, 10, 3.0)), rows((1, 0, 10, 2.0)).assign(budget=20.0)
    both = pd.concat([short, long], ignore_index=True)
    assert study_frontier(both, "bytes", "loss").tolist() == [True, True]
