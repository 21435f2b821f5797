"""Quality against what a model costs: the figures in which large compressed and small models meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from train_then_compress.analysis import drawing
from train_then_compress.analysis.frontier import frontier, mean_over_seeds
from train_then_compress.analysis.measures import MEASURES, Measure
from train_then_compress.analysis.series import Model, heading, left_out, models_of, setting
from train_then_compress.analysis.table import Study, family_order, recipe_family
from train_then_compress.config.steps import STEPS

COSTS = [
    drawing.Quantity("bytes", "size of the packed file", "bytes"),
    drawing.Quantity("nonzero", "non-zero parameters", "count"),
    drawing.Quantity("throughput_beam", "target tokens per second", "count", higher_is_better=True),
]
#: By a model's keys and a family of recipes.
Colours = dict[tuple[tuple[int, int, str], str], str]
_FRONTIER: dict[str, Any] = {"color": "0.15", "linestyle": (0, (4, 2)), "linewidth": 1.0}


def quality_by_cost(study: Study, quality: Measure, cost: drawing.Quantity) -> Figure | None:
    """Every model and recipe (mean over seeds) of a study of one cell, and the frontier.

    Colour says which model or, where there is one alone, which family of recipes; the marker which family, the smaller
    the stronger; a faint line joins one model's strengths. None where no point has both quality and cost.
    """
    runs = study.runs[study.runs["learned"]]
    points = study.points[study.points["run"].isin(runs["run"])].dropna(subset=[quality.column, cost.column])
    if points.empty:
        return None
    means, limits = _to_draw(points, quality, cost, runs)
    title = f"{quality.title} against {cost.name}"
    with drawing.page(title, setting(study, "mean and range of up to {seeds} seeds")) as (figure, axes):
        faster = ", faster is on the left" if cost.higher_is_better else ""
        axes.set(xlabel=f"{cost.name} (log scale{faster})", ylabel=quality.label, ylim=limits)
        low, high = drawing.padded(means["x"])
        room = (high / low) ** 0.16  # for names, on the cheap side
        if cost.higher_is_better:
            drawing.log_axis(axes, "x", low, high * room, cost.unit)
            axes.invert_xaxis()
        else:
            drawing.log_axis(axes, "x", low / room, high, cost.unit)
        if quality.logarithmic:
            drawing.log_axis(axes, "y", *limits, "plain")
        marks, models = _marks(points), models_of(runs)
        models = [model for model in models if len(model.rows(means))]
        colours = _colours(models, marks)
        _draw_lines(axes, models, means, colours)
        _draw_markers(axes, means, marks, colours)
        best = means[means["frontier"]].sort_values("x", ascending=not cost.higher_is_better)
        axes.step(best["x"], best["y"], where="post", zorder=2.5, **_FRONTIER)
        legends = [(heading(runs), _model_entries(models)), ("recipe", _recipe_entries(marks, models, colours))]
        drawing.lay_out(figure, axes, legends, [_explained(marks), *_cut_off(means, quality), *left_out(study)])
        labels = list(dict.fromkeys(zip(best["x"], best["y"], best["recipe"].map(_shown), strict=True)))
        drawing.label_points(figure, axes, labels, means[["x", "y"]].to_numpy(), below=not quality.higher_is_better)
    return figure


def _to_draw(
    points: pd.DataFrame, quality: Measure, cost: drawing.Quantity, runs: pd.DataFrame
) -> tuple[pd.DataFrame, tuple[float, float]]:
    """Means over seeds with where to draw them (``x``, ``y``, ``low``, ``high``; ``cut``: moved to the edge),
    ``family`` and ``frontier``; and the ends of the quality axis.

    Models that compression has ruined would press all others into a corner, so they are moved.
    """
    ranking = MEASURES[runs["task"].iloc[0]].points[0]
    means = mean_over_seeds(points, list(dict.fromkeys([cost.column, quality.column, ranking.column])))
    means["family"] = means["recipe"].map(recipe_family)
    means["x"] = means[cost.column].astype(float)
    means["cost"] = -means["x"] if cost.higher_is_better else means["x"]
    baseline = runs["baseline_test"].max()
    sound = means[ranking.reaches(means[ranking.column], baseline) | pd.isna(baseline)]
    best = frontier(sound, "cost", quality.column, quality.higher_is_better)
    means["frontier"] = best.reindex(means.index, fill_value=False)
    values = means[quality.column] * quality.scale
    dense = values[means["recipe"] == "none"]
    dense = dense if len(dense) else values[means["frontier"]]
    if quality.higher_is_better:
        means["cut"] = values < dense.min() * quality.tolerance
    else:
        means["cut"] = values > dense.max() * quality.tolerance
    low, high = _limits(values[~means["cut"]], quality)
    for shown, column in (("y", ""), ("low", "_low"), ("high", "_high")):
        means[shown] = (means[quality.column + column] * quality.scale).clip(low, high)
    return means, (low, high)


def _limits(values: pd.Series[float], quality: Measure) -> tuple[float, float]:
    """The ends of the quality axis, with room for names on the frontier's free side."""
    if quality.logarithmic:
        low, high = drawing.padded(values, 0.1)
        room = (high / low) ** 0.08
        return (low, high * room) if quality.higher_is_better else (low / room, high)
    margin = max(0.1 * (values.max() - values.min()), 0.005 * abs(values.max()), 0.01)
    return values.min() - margin, values.max() + margin


def _marks(points: pd.DataFrame) -> dict[str, tuple[str, float]]:
    """Marker and its size (typographic points) for each recipe, family by family from light to strong."""
    recipes = list(points.groupby("recipe")["bytes"].mean().sort_values(ascending=False).index)
    marks: dict[str, tuple[str, float]] = {}
    for index, family in enumerate(sorted({recipe_family(recipe) for recipe in recipes}, key=family_order)):
        members = [recipe for recipe in recipes if recipe_family(recipe) == family]
        # The dense model's shows behind one drawn over it: quantization leaves the number of parameters as it was.
        sizes = np.linspace(8, 4.5, len(members)) if len(members) > 1 else [9.0 if family == "dense" else 7.0]
        marks |= {recipe: (drawing.marker(index), float(size)) for recipe, size in zip(members, sizes, strict=True)}
    return marks


def _colours(models: list[Model], marks: Iterable[str]) -> Colours:
    """A model's colour; of one model alone, colours that tell the families apart."""
    families = dict.fromkeys(map(recipe_family, marks))
    apart = dict(zip(families, drawing.distinct_colours(len(families)), strict=True))
    return {(model.keys, family): apart[family] if len(models) == 1 else model.colour
            for model in models for family in families}  # fmt: skip


def _draw_lines(axes: Axes, models: list[Model], means: pd.DataFrame, colours: Colours) -> None:
    """A faint line through each model's strengths of one family, from the dense model; bars for the range of seeds."""
    chains: list[np.ndarray] = []
    chain_colours, bars, bar_colours = [], [], []
    kept = means[~means["cut"]].sort_values("x")
    for model in models:
        own = model.rows(kept)
        for family in own["family"].unique():
            chains.append(own.loc[own["family"].isin(["dense", family]), ["x", "y"]].to_numpy())
            chain_colours.append(colours[model.keys, family])
        several = own[own["seeds"] > 1]
        bars += [[(x, low), (x, high)] for x, low, high in several[["x", "low", "high"]].to_numpy()]
        bar_colours += [colours[model.keys, family] for family in several["family"]]
    axes.add_collection(LineCollection(chains, colors=chain_colours, alpha=0.45, linewidths=0.8, zorder=2))
    axes.add_collection(LineCollection(bars, colors=bar_colours, linewidths=1.0, zorder=3))


def _draw_markers(axes: Axes, means: pd.DataFrame, marks: dict[str, tuple[str, float]], colours: Colours) -> None:
    for (family, cut), rows in means.groupby(["family", "cut"], sort=False):
        keys = zip(rows["depth"], rows["width"], rows["variant"], strict=True)
        own = [colours[each, str(family)] for each in keys]
        axes.scatter(
            rows["x"], rows["y"], s=[marks[recipe][1] ** 2 for recipe in rows["recipe"]],
            marker=marks[rows["recipe"].iloc[0]][0], facecolors=["white"] * len(rows) if cut else own,
            edgecolors=own if cut else ["white"], linewidths=1.2 if cut else 0.6, clip_on=False, zorder=4,
        )  # fmt: skip


def _model_entries(models: list[Model]) -> list[Line2D]:
    return [Line2D([], [], marker="o", linestyle="", color=model.colour, markersize=6.5, label=model.name)
            for model in models]  # fmt: skip


def _recipe_entries(marks: dict[str, tuple[str, float]], models: list[Model], colours: Colours) -> list[Line2D]:
    """Grey where colour says which model."""
    entries = [Line2D([], [], marker=marker, markersize=size, linestyle="", label=_shown(recipe),
                      color=colours[models[0].keys, recipe_family(recipe)] if len(models) == 1 else "0.35")
               for recipe, (marker, size) in marks.items()]  # fmt: skip
    return [*entries, Line2D([], [], label="frontier", **_FRONTIER)]


def _shown(recipe: str) -> str:
    return "dense" if recipe == "none" else recipe


def _explained(recipes: Iterable[str]) -> str:
    methods = dict.fromkeys(part for recipe in recipes for part in recipe_family(recipe).split("+"))
    known = [STEPS[method].explained for method in methods if method in STEPS]
    return "; ".join(known) + ("." if known else "")


def _cut_off(means: pd.DataFrame, quality: Measure) -> list[str]:
    cut = means[means["cut"]]
    if cut.empty:
        return []
    worst = (cut[quality.column].min() if quality.higher_is_better else cut[quality.column].max()) * quality.scale
    edge = "lower" if quality.higher_is_better else "upper"
    number = f"{worst:,.0f}" if worst > 1000 else f"{worst:.4g}"
    where = f"{len(cut)} of {len(means)} points lie beyond it, the worst at {number}"
    return [f"Hollow markers at the {edge} edge: {where}{' %' if quality.unit == '%' else ''}."]
