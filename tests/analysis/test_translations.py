"""A study of translators: its rows, its baseline, and BLEU against a cost of which more is better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train_then_compress.analysis.figures import draw_study
from train_then_compress.analysis.measures import MEASURES
from train_then_compress.analysis.quality_by_cost import COSTS, quality_by_cost
from train_then_compress.analysis.table import load_study, render
from train_then_compress.records import RunDirectory, read_json, read_rows, rewrite_rows, write_json

Writer = Callable[..., RunDirectory]
RECIPES = ["none", "quant8", "quant4", "quant2"]


def translated(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row with BLEU and chrF that follow from its loss."""
    row = {name: value for name, value in row.items() if name != f"{prefix}accuracy"}
    return row | {f"{prefix}bleu": 60 - 15 * row[f"{prefix}loss"], f"{prefix}chrf": 80 - 10 * row[f"{prefix}loss"]}


@pytest.fixture
def translators(tmp_path: Path, write: Writer) -> Path:
    """Three shapes; the speed of a point is 1 / its number of parameters, but for one that is slow for no reason."""
    directory = tmp_path / "mt"
    for depth, width in ((1, 64), (2, 128), (4, 192)):
        run = write(
            directory, depth, width, recipes=RECIPES, task={"name": "translation"},
            data={"name": "debian_pairs", "vocab_size": 2048},
            model={"name": "transformer", "depth": depth, "width": width, "head_size": 32},
        )  # fmt: skip
        validation = [row["split"] == "validation" for row in read_rows(run.metrics)]
        rows = zip(read_rows(run.metrics), validation, strict=True)
        rewrite_rows(run.metrics, [translated(row) if judged else row for row, judged in rows])
        (path,) = run.path.glob("stages/pretrain-*/record.json")
        record = read_json(path)
        record["validation"] = translated(record["validation"])
        record["corpus"] = {"copy_bleu": {"valid": 3.0, "test": 4.0}, "copy_chrf": {"valid": 20.0, "test": 21.0}}
        write_json(path, record)
        points = [translated(row, "test_") for row in run.points().values()]
        for row in points:
            row["throughput_beam"] = 1e9 / row["parameters"] / (2 if row["recipe"] == "quant8" else 1)
        rewrite_rows(run.path / "points.jsonl", points)
    return directory


def test_the_source_copied_is_the_baseline(translators: Path) -> None:
    points = load_study(translators).points
    (copied,) = points[points["recipe"] == "copy"].to_dict("records")
    assert copied["test_bleu"] == 4 and copied["test_chrf"] == 21 and copied["validation_bleu"] == 3
    assert copied["corpus"] == "debian_pairs:en-it" and not copied["frontier"]
    ruined = points[points["ruined"]]
    assert set(ruined["recipe"]) == {"quant2", "copy"} and (ruined["test_bleu"] <= 4).all()


def test_the_table_shows_bleu_and_chrf_and_no_accuracy(translators: Path) -> None:
    heading = render(load_study(translators).points, "md").splitlines()[0]
    for name in ("test BLEU", "test chrF", "dense validation BLEU", "tokens/s by beam search"):
        assert f"| {name} " in heading.replace("  ", " ") or name in heading
    assert "accuracy" not in heading and "perplexity" not in heading


def test_more_tokens_a_second_are_cheaper_and_lie_on_the_left(translators: Path) -> None:
    study = load_study(translators)
    speed = next(cost for cost in COSTS if cost.higher_is_better)
    figure = quality_by_cost(study, MEASURES["translation"].points[0], speed)
    assert figure is not None
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert left > right and "faster is on the left" in axes.get_xlabel()
    (steps,) = (line for line in axes.lines if len(line.get_xdata()) > 0 and line.get_drawstyle() == "steps-post")
    points = [row for row in study.points.to_dict("records") if row["test_bleu"] > 4 and row["recipe"] != "copy"]
    best = [
        (row["throughput_beam"], row["test_bleu"]) for row in points
        if not any(other["throughput_beam"] >= row["throughput_beam"] and other["test_bleu"] >= row["test_bleu"]
                   and (other["throughput_beam"], other["test_bleu"]) != (row["throughput_beam"], row["test_bleu"])
                   for other in points)
    ]  # fmt: skip
    drawn = np.array([steps.get_xdata(), steps.get_ydata()], dtype=float).T
    assert drawn == pytest.approx(np.array(sorted(best, reverse=True))) and 1 < len(best) < len(points)


def test_the_figures_are_bleu_against_time_and_costs(translators: Path, tmp_path: Path) -> None:
    names = {path.name for path in draw_study(translators, tmp_path / "out") if path.suffix == ".svg"}
    by_cost = {f"test_{measure}_by_{cost.column}.svg" for measure in ("bleu", "chrf") for cost in COSTS}
    assert by_cost | {"convergence_seconds.svg", "convergence_steps.svg", "dense_by_size.svg"} <= names
    curves = (tmp_path / "out" / "convergence_seconds.svg").read_text()
    assert "Validation BLEU against training time" in curves and "debian_pairs:en-it" in curves
