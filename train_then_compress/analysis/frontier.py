"""Which points no other point beats, and what the seeds of one model have in common."""

from __future__ import annotations

import numpy as np
import pandas as pd

#: Points are compared only where all of these agree: one test text, one vocabulary, one training budget.
CELL = ["task", "corpus", "vocab_size", "budget_kind", "budget"]
#: Runs that agree in these (and in `CELL`) differ in nothing but their seed.
SERIES = ["depth", "width", "variant"]


def frontier(points: pd.DataFrame, cost: str, quality: str, higher_is_better: bool = False) -> pd.Series[bool]:
    """True for each point that no other point beats, indexed as ``points``.

    ``cost`` (lower is better) and ``quality`` name columns. One point beats another when it is no worse in both and
    better in at least one, so of several points of equal cost only the best is kept, and of twins both. A point
    without a finite cost and quality is never on the frontier. O(n log n).
    """
    costs = points[cost].to_numpy(dtype=float, na_value=np.nan)
    losses = points[quality].to_numpy(dtype=float, na_value=np.nan) * (-1 if higher_is_better else 1)
    finite = np.flatnonzero(np.isfinite(costs) & np.isfinite(losses))
    mask = np.zeros(len(points), dtype=bool)
    if len(finite):
        order = finite[np.lexsort((losses[finite], costs[finite]))]
        _, first, group = np.unique(costs[order], return_index=True, return_inverse=True)
        best = losses[order][first]  # the best of each cost, costs ascending
        best_of_cheaper = np.concatenate(([np.inf], np.minimum.accumulate(best)[:-1]))
        mask[order] = ((best < best_of_cheaper)[group]) & (losses[order] == best[group])
    return pd.Series(mask, index=points.index, dtype=bool)


def mean_over_seeds(points: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row per model (`CELL`, `SERIES`) and recipe: each column's mean, ``<column>_low`` and ``<column>_high``
    (the smallest and largest of the seeds), and ``seeds``, the number of rows that went in.
    """
    groups = points.groupby([*CELL, *SERIES, "recipe"], dropna=False, sort=False)
    parts = {"seeds": groups.size()}
    for column in columns:
        parts |= {column: groups[column].mean(), f"{column}_low": groups[column].min(),
                  f"{column}_high": groups[column].max()}  # fmt: skip
    return pd.DataFrame(parts).reset_index()


def study_frontier(points: pd.DataFrame, cost: str, quality: str, higher_is_better: bool = False) -> pd.Series[bool]:
    """The frontier of each cell (`CELL`), judged on means over seeds: every seed of a model on it is marked.

    Judging single seeds would favour whichever model was run most often.
    """
    marked = pd.Series(False, index=points.index)
    keys = [*CELL, *SERIES, "recipe"]
    for _, cell in points.groupby(CELL, dropna=False, sort=False):
        means = mean_over_seeds(cell, [cost, quality])
        best = means.loc[frontier(means, cost, quality, higher_is_better), keys]
        marked.loc[cell.index] = cell[keys].merge(best, how="left", on=keys, indicator=True)["_merge"].eq("both").array
    return marked
