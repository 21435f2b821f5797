"""The figures of a study, one function each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train_then_compress.analysis import drawing
from train_then_compress.analysis.frontier import CELL
from train_then_compress.analysis.measures import MEASURES, Measure
from train_then_compress.analysis.quality_by_cost import COSTS, quality_by_cost
from train_then_compress.analysis.series import heading, left_out, models_of, setting
from train_then_compress.analysis.table import Study, load_study
from train_then_compress.records import DENSE_STAGES

SPENT = [
    drawing.Quantity("seconds", "training time", "time"),
    drawing.Quantity("flops", "training FLOPs", "count"),
    drawing.Quantity("tokens", "training tokens", "count"),
    drawing.Quantity("steps", "optimizer steps", "count"),
]
#: Convergence is drawn from this multiple of the best final perplexity downwards, to show where curves cross.
_BEGINNING = 6.0
#: A last evaluation from this progress on is that of a finished training (the budget may be met a step early).
_FINISHED = 0.999


def draw_study(directory: Path, out: Path | None = None) -> list[Path]:
    """Draw every figure that the study's records allow, to ``out`` (default: ``figures`` in the study); the files.

    `load_study` says in words what is missing; each figure's footnote says what it leaves out.
    """
    return draw(load_study(directory), out or directory / "figures")


def draw(study: Study, out: Path) -> list[Path]:
    """As `draw_study`, from a study already read. Budgets, corpora and tasks are drawn apart from each other."""
    written = []
    for suffix, cell in _cells(study):
        figures = {f"convergence_{spent.column}": convergence(cell, spent) for spent in SPENT}
        for quality in MEASURES[cell.runs["task"].iloc[0]].points:
            figures |= {f"{quality.column}_by_{cost.column}": quality_by_cost(cell, quality, cost) for cost in COSTS}
        figures["dense_by_size"] = dense_by_size(cell)
        for name, figure in figures.items():
            if figure is not None:
                written += drawing.save(figure, out, name + suffix)
    return written


def _cells(study: Study) -> Iterator[tuple[str, Study]]:
    """The study in parts of one task, corpus, vocabulary and budget, each with a suffix for its files' names."""
    if study.runs.empty:
        return
    varied = [column for column in CELL if study.runs[column].nunique() > 1]
    if "budget" in varied and "budget_kind" not in varied:
        varied.insert(varied.index("budget"), "budget_kind")
    for values, runs in study.runs.groupby(CELL, sort=True):
        named = dict(zip(CELL, values, strict=True))
        suffix = "".join(f"{named[column]:g}" if column == "budget" else f"-{named[column]}" for column in varied)
        points, metrics = (frame[frame["run"].isin(runs["run"])] if len(frame) else frame
                           for frame in (study.points, study.metrics))  # fmt: skip
        yield re.sub(r"[^\w.-]+", "_", suffix), dataclasses.replace(study, runs=runs, points=points, metrics=metrics)


def convergence(study: Study, spent: drawing.Quantity) -> Figure | None:
    """The task's validation measure against what training has spent, a line per model of a study of one cell.

    Several finished seeds are drawn as their mean at equal progress with a band from the best to the worst; an
    unfinished one as a thin line. The plateau at the beginning is cut off. None where nothing has been evaluated.
    """
    runs = study.runs[study.runs["learned"]]
    measures = MEASURES[study.runs["task"].iloc[0]]
    measure = measures.curve
    curves = _curves(study.metrics, runs, spent.column, measure)
    if not curves:
        return None
    rows = pd.concat(curves.values())
    low, high = _visible([curve["quality"] for curve in curves.values()], measure)
    visible = rows.loc[rows["quality"].between(low, high), spent.column]
    about = setting(study, "mean and range of up to {seeds} seeds")
    with drawing.page(f"{measure.title} against {spent.name}", about) as (figure, axes):
        axes.set(xlabel=f"{spent.name} (log scale)", ylabel=measure.label, ylim=(low, high))
        drawing.log_axis(axes, "x", *drawing.padded(visible, 0.03), spent.unit)
        if measure.logarithmic:
            drawing.log_axis(axes, "y", low, high, "plain")
        _draw_baseline(axes, runs["baseline_validation"].max() * measure.scale, measures.baseline)
        entries = []
        for model in models_of(runs):
            style: dict[str, Any] = {"color": model.colour, "linestyle": drawing.dashes(model.index)}
            style["marker"] = drawing.marker(model.index)
            seeds = [curves[run] for run in model.rows(runs)["run"] if run in curves]
            _draw_curves(axes, seeds, spent.column, style)
            entries += [Line2D([], [], label=model.name, markersize=4.5, **style)] if seeds else []
        drawing.lay_out(figure, axes, [(heading(runs), entries)], left_out(study))
    return figure


def _visible(curves: list[pd.Series[float]], measure: Measure) -> tuple[float, float]:
    """The ends of the quality axis: where the curves end and what leads there."""
    last, rows = [curve.iloc[-1] for curve in curves], pd.concat(curves)
    if measure.logarithmic:
        highest = min(rows.max() * 1.05, max(min(last) * _BEGINNING, max(last) * 1.3))
        return drawing.padded([min(last), highest])[0], highest
    margin = max(0.05 * (rows.max() - rows.min()), 0.01 * measure.scale)
    return rows.min() - margin, rows.max() + margin


def _curves(metrics: pd.DataFrame, runs: pd.DataFrame, column: str, measure: Measure) -> dict[str, pd.DataFrame]:
    """For each of these runs the finite validation rows of its dense model's training, by progress, with ``quality``
    in the unit of the axis."""
    if not {"stage", "split", "progress", measure.column, column} <= set(metrics.columns):
        return {}
    rows = metrics[(metrics["split"] == "validation") & metrics["run"].isin(runs["run"])]
    rows = rows[rows["stage"].str.startswith(DENSE_STAGES) & (rows[column] > 0)]
    rows = rows.assign(quality=rows[measure.column].astype(float) * measure.scale)
    rows = rows[np.isfinite(rows["quality"])].sort_values("progress")
    return {str(run): curve for run, curve in rows.groupby("run")}


def _draw_curves(axes: Axes, seeds: list[pd.DataFrame], column: str, style: dict[str, Any]) -> None:
    style = style | {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.4}
    finished = [seed for seed in seeds if seed["progress"].iloc[-1] >= _FINISHED]
    if len(finished) > 1:
        grid = finished[0]["progress"]
        grid = grid[grid >= max(seed["progress"].iloc[0] for seed in finished)]
        spent, quality = (np.array([np.interp(grid, seed["progress"], seed[name]) for seed in finished])
                          for name in (column, "quality"))  # fmt: skip
        x = spent.mean(axis=0)
        axes.fill_between(x, quality.min(axis=0), quality.max(axis=0), color=style["color"], alpha=0.25, lw=0)
        axes.plot(x, quality.mean(axis=0), **style)
        seeds = [seed for seed in seeds if seed["progress"].iloc[-1] < _FINISHED]
    for seed in seeds:
        axes.plot(seed[column], seed["quality"], linewidth=0.7 if len(finished) > 1 else 1.4, **style)


def _draw_baseline(axes: Axes, value: float, name: str) -> None:
    low, high = axes.get_ylim()
    if low < value < high:
        axes.axhline(value, color="0.45", linewidth=0.8, linestyle=":", zorder=1)
        axes.annotate(f"{name} model ({value:.3g})", (0.005, value), (0, -2), va="top", fontsize=7.5,
                      xycoords=("axes fraction", "data"), textcoords="offset points", color="0.35")  # fmt: skip


def dense_by_size(study: Study) -> Figure | None:
    """The dense models' quality against what varies of depth and width: seeds as points, means as lines.

    Where both vary but in no grid, against parameters. None for fewer than three shapes.
    """
    learned = study.runs.loc[study.runs["learned"], "run"]
    dense = study.points[study.points["run"].isin(learned) & (study.points["recipe"] == "none")]
    measure = MEASURES[study.runs["task"].iloc[0]].points[0]
    dense = dense.assign(quality=dense[measure.column].astype(float) * measure.scale).dropna(subset="quality")
    if len(dense[["depth", "width"]].drop_duplicates()) < 3:
        return None
    column, by = _what_varies(dense)
    unit = {"depth": "layers, ", "width": "units, ", "parameters": ""}[column]
    about = setting(study, "up to {seeds} seeds as points, their mean as a line")
    with drawing.page(f"{measure.title} of the dense models against {column}", about) as (figure, axes):
        axes.set(xlabel=f"{column} ({unit}log scale)", ylabel=measure.label)
        drawing.log_axis(axes, "x", *drawing.padded(dense[column].astype(float)), "count")
        if measure.logarithmic:
            drawing.log_axis(axes, "y", *drawing.padded(dense["quality"], 0.1), "plain")
        if column != "parameters":
            drawing.ticks_at(axes, sorted(dense[column].unique()))
        draw_lines = _draw_models_apart if column == "parameters" else _draw_lines
        legends = draw_lines(axes, dense, column, by)
        drawing.lay_out(figure, axes, legends, left_out(study))
    return figure


def _draw_lines(axes: Axes, dense: pd.DataFrame, column: str, by: list[str]) -> list[tuple[str, list[Line2D]]]:
    """A line for each value of ``by``; the legends."""
    groups = list(dense.groupby(by)) if by else [((), dense)]
    entries = []
    for index, ((values, rows), colour) in enumerate(zip(groups, drawing.size_colours(len(groups)), strict=True)):
        style: dict[str, Any] = {"color": colour, "linestyle": drawing.dashes(index)}
        mark: dict[str, Any] = {"marker": drawing.marker(index), "markersize": 5}
        axes.plot(rows[column].astype(float), rows["quality"], linestyle="", color=colour, alpha=0.6, **mark)
        means = rows.groupby(column)["quality"].mean()
        axes.plot(means.index.astype(float), means, **style)
        words = [f"{name} {value}".removeprefix("variant ") for name, value in zip(by, values, strict=True)]
        entries.append(Line2D([], [], label=", ".join(words), **style, **mark))
    return [("models", entries)] if by else []


def _draw_models_apart(axes: Axes, dense: pd.DataFrame, column: str, by: list[str]) -> list[tuple[str, list[Line2D]]]:
    """A colour for each model, whose shape the x axis does not tell, and a line through all means; the legends."""
    for _, rows in dense.groupby(by) if by else [((), dense)]:
        means = rows.groupby(column)["quality"].mean()
        axes.plot(means.index.astype(float), means, color="0.7", linewidth=1.0, zorder=1.5)
    entries = []
    for model in models_of(dense):
        style: dict[str, Any] = {"color": model.colour, "marker": drawing.marker(model.index), "linestyle": ""}
        rows = model.rows(dense)
        axes.plot(rows[column].astype(float), rows["quality"], markersize=6, **style)
        entries.append(Line2D([], [], label=model.name, **style))
    return [(heading(dense), entries)]


def _what_varies(dense: pd.DataFrame) -> tuple[str, list[str]]:
    """The column for the x axis, and those that tell lines apart."""
    variant = ["variant"] if dense["variant"].nunique() > 1 else []
    depths, widths = dense["depth"].nunique(), dense["width"].nunique()
    if min(depths, widths) == 1:
        return ("width" if depths == 1 else "depth"), variant
    column, other = ("depth", "width") if depths >= widths else ("width", "depth")
    is_grid = dense.groupby(other)[column].nunique().min() > 1
    return (column, [other, *variant]) if is_grid else ("parameters", variant)
