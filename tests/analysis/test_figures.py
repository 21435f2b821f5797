"""The figures: what is drawn, what is said, and that nothing covers anything."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from train_then_compress.analysis import drawing
from train_then_compress.analysis.figures import SPENT, convergence, dense_by_size, draw_study
from train_then_compress.analysis.measures import MEASURES
from train_then_compress.analysis.quality_by_cost import COSTS, quality_by_cost
from train_then_compress.analysis.table import load_study
from train_then_compress.records import RunDirectory

Writer = Callable[..., RunDirectory]
NAMES = {f"convergence_{unit}" for unit in ("seconds", "flops", "tokens", "steps")} | {"dense_by_size"} | {
    f"{quality}_by_{cost}" for quality in ("test_perplexity", "test_accuracy") for cost in ("bytes", "nonzero")
}  # fmt: skip


def texts(path: Path) -> list[str]:
    """The texts of an SVG, line by line."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text().replace("\N{NO-BREAK SPACE}", " "))


def words(path: Path) -> str:
    """The texts of an SVG in one line."""
    return " ".join(texts(path))


def test_every_figure_is_written_as_svg_and_png_and_nothing_else_is(study: Path) -> None:
    paths = draw_study(study)
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")}
    assert set(paths) == set((study / "figures").iterdir()), "no temporary file stays"
    for path in paths:
        head = path.read_bytes()[:24]
        if path.suffix == ".png":
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(head[16:20], "big") == round(7.2 * 150), "7.2 inches at 150 dots per inch"
        else:
            assert head.startswith(b"<?xml")


def test_the_text_names_axes_units_models_recipes_and_budget(study: Path, tmp_path: Path) -> None:
    draw_study(study, tmp_path / "out")
    quality = words(tmp_path / "out" / "test_perplexity_by_bytes.svg")
    for expected in ("Test perplexity against size of the packed file", "sizes: 10 min of training per model",
                     "sotu_wiki, vocabulary 2,048", "size of the packed file (log scale)", "100 kB", "1 MB",
                     "test perplexity (log scale, lower is better)", "1 × 64", "2 × 128", "4 × 192", "dense", "quant4",
                     "prune60+quant4", "frontier", "quantB: weights of B bits"):  # fmt: skip
        assert expected in quality
    accuracy = words(tmp_path / "out" / "test_accuracy_by_nonzero.svg")
    assert "masked-token test accuracy (%, higher is better)" in accuracy
    assert "non-zero parameters (log scale)" in accuracy and "1M" in accuracy
    curves = words(tmp_path / "out" / "convergence_seconds.svg")
    assert "training time (log scale)" in curves and "2 min" in curves and "validation perplexity" in curves


def test_what_is_unfinished_stands_in_the_footnote_and_the_rest_is_drawn(study: Path, tmp_path: Path) -> None:
    draw_study(study, tmp_path / "out")
    curves = words(tmp_path / "out" / "convergence_steps.svg")
    assert ("Not finished: 2 × 192 (no prune60+quant4, oneshot60), 4 × 256 (49% of training), "
            "6 × 256 (stopped at 34% of training).") in curves  # fmt: skip
    figure = convergence(load_study(study), SPENT[0])
    assert figure is not None
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "1 × 64", "2 × 128", "2 × 192", "4 × 192", "4 × 256", "6 × 256",
    }  # fmt: skip


def test_a_model_that_learned_nothing_is_not_drawn_but_named(tmp_path: Path, write: Writer) -> None:
    for depth, width in [(1, 64), (2, 64), (2, 128)]:
        write(tmp_path / "s", depth, width)
    write(tmp_path / "s", 8, 256, loss=math.log(400))
    for path in draw_study(tmp_path / "s"):
        if path.suffix == ".svg":
            assert "8 × 256" not in texts(path), "no entry in the legend"
            assert "Left out, since it has learned too little" in words(path) and "8 × 256." in words(path)


def test_ruined_models_are_drawn_hollow_at_the_edge_and_counted(study: Path) -> None:
    loaded = load_study(study)
    dense = loaded.points.loc[loaded.points["recipe"] == "none", "test_perplexity"]
    beyond = loaded.points[(loaded.points["test_perplexity"] > 2.5 * dense.max()) & (loaded.points["run"] != "")]
    assert len(beyond) == 4, "one quant2 for each of the four models that have points"
    figure = quality_by_cost(loaded, MEASURES["mlm"].points[0], COSTS[0])
    assert figure is not None
    worst = f"{beyond['test_perplexity'].max():,.0f}"
    assert f"upper edge: 4 of 30 points lie beyond it, the worst at {worst}." in figure.texts[-1].get_text()
    hollow = [dots for dots in figure.axes[0].collections if dots.get_facecolor().tolist() == [[1, 1, 1, 1]] * 4]
    top = figure.axes[0].get_ylim()[1]
    assert len(hollow) == 1 and np.allclose(hollow[0].get_offsets()[:, 1], top)


def test_the_line_of_the_frontier_joins_the_points_marked_in_the_table(study: Path) -> None:
    loaded = load_study(study)
    figure = quality_by_cost(loaded, MEASURES["mlm"].points[0], COSTS[0])
    assert figure is not None
    best = loaded.points[loaded.points["frontier"]].sort_values("bytes")
    line = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == len(best))
    assert np.asarray(line.get_xdata()).tolist() == best["bytes"].tolist()
    assert np.allclose(np.asarray(line.get_ydata()), best["test_perplexity"])


def test_finished_seeds_are_drawn_as_their_mean_and_range(tmp_path: Path, write: Writer) -> None:
    for seed in range(3):
        write(tmp_path / "s", 2, 64, seed=seed)
    loaded = load_study(tmp_path / "s")
    rows = loaded.metrics[loaded.metrics["split"] == "validation"]
    by_progress = rows.groupby("progress")["perplexity"]
    figure = convergence(loaded, SPENT[0])
    assert figure is not None
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 12]
    assert len(lines) == 1 and np.allclose(lines[0].get_ydata(), by_progress.mean())
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(by_progress.min().min())
    assert "mean and range of up to 3 seeds" in "".join(text.get_text() for text in figure.texts)


def test_budgets_are_drawn_apart(tmp_path: Path, write: Writer) -> None:
    for seconds in (300, 600):
        write(tmp_path / "s", 2, 64, budget={"kind": "seconds", "value": seconds})
    names = {path.stem for path in draw_study(tmp_path / "s")}
    assert {"convergence_steps-seconds300", "test_accuracy_by_bytes-seconds600"} <= names and len(names) == 2 * 8
    assert "5 min of training" in words(tmp_path / "s" / "figures" / "convergence_steps-seconds300.svg")


@pytest.mark.parametrize(
    ("shapes", "label", "lines"),
    [
        ([(2, 64), (4, 64)], None, 0),
        ([(2, 64), (4, 64), (8, 64)], "depth (layers, log scale)", 1),
        ([(2, 64), (2, 96), (2, 128)], "width (units, log scale)", 1),
        ([(2, 64), (4, 64), (2, 128), (4, 128)], "depth (layers, log scale)", 2),
        ([(1, 64), (2, 96), (4, 128)], "parameters (log scale)", 1),
    ],
)
def test_dense_models_are_drawn_against_what_varies(
    tmp_path: Path, write: Writer, shapes: list[tuple[int, int]], label: str | None, lines: int
) -> None:
    for depth, width in shapes:
        write(tmp_path / "s", depth, width, recipes=["none"])
    figure = dense_by_size(load_study(tmp_path / "s"))
    assert (figure.axes[0].get_xlabel() if figure else None) == label
    if figure:
        assert len([line for line in figure.axes[0].lines if line.get_linestyle() != "None"]) == lines


def test_a_study_with_nothing_to_draw_writes_nothing(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "s", 1, 64, progress=0.0)
    assert draw_study(tmp_path / "s") == []


def test_the_same_records_give_the_same_svg(study: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in draw_study(study, tmp_path / "a") if path.suffix == ".svg"}
    second = {path.name: path.read_bytes() for path in draw_study(study, tmp_path / "b") if path.suffix == ".svg"}
    assert first == second and len(first) == len(NAMES)


def assert_nothing_is_covered(figure: Figure) -> None:
    """Legends, titles and notes lie on the page and beside the axes; the names of points beside each other."""
    figure.draw_without_rendering()
    page, axes = figure.bbox, figure.axes[0]
    outside = [legend.get_window_extent() for legend in figure.legends]
    outside += [text.get_window_extent() for text in figure.texts if text.get_text()]
    inner = axes.get_window_extent()
    labels = [axes.xaxis.get_tightbbox(), axes.yaxis.get_tightbbox()]
    for box in outside:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert all(other is not None and not box.overlaps(other) for other in [inner, *labels])
    names = [Text.get_window_extent(text) for text in axes.texts]
    for boxes in (outside, names):
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize("many", [False, True])
def test_nothing_covers_anything(study: Path, write: Writer, many: bool) -> None:
    for depth in range(7, 27) if many else ():
        write(study, depth, 64, progress=1.0 if depth % 3 else 0.7, optimizer={"lr": depth / 1e4})
    loaded = load_study(study)
    figures = [quality_by_cost(loaded, quality, cost) for quality in MEASURES["mlm"].points for cost in COSTS[:2]]
    figures += [convergence(loaded, SPENT[0]), dense_by_size(loaded)]
    for figure in figures:
        assert figure is not None
        assert_nothing_is_covered(figure)


@given(st.integers(1, 30))
def test_colours_darken_with_size(count: int) -> None:
    luminance = [0.2126 * red + 0.7152 * green + 0.0722 * blue
                 for red, green, blue in map(to_rgb, drawing.size_colours(count))]  # fmt: skip
    assert all(small > large for small, large in pairwise(luminance))
    assert luminance[0] < 0.75, "the lightest is still seen on white"


@given(st.floats(0.5, 1e7), st.floats(1.05, 1e6), st.sampled_from(["count", "bytes", "plain", "time"]))
def test_ticks_are_few_lie_inside_and_read_differently(low: float, ratio: float, unit: drawing.Unit) -> None:
    ticks = drawing.log_ticks(low, low * ratio, unit)
    assert 1 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert len({drawing.humane(tick, unit) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(30, "time", "30 s"), (60, "time", "1 min"), (90, "time", "90 s"), (600, "time", "10 min"), (7200, "time", "2 h"),
     (172800, "time", "2 d"), (400e3, "bytes", "400 kB"), (1e6, "bytes", "1 MB"), (999, "bytes", "999 B"),
     (20000, "count", "20k"), (3e6, "count", "3M"), (1e13, "count", "10T"), (12.5, "plain", "12.5")],
)  # fmt: skip
def test_numbers_are_written_with_their_units(value: float, unit: drawing.Unit, text: str) -> None:
    assert drawing.humane(value, unit) == text


def test_the_figures_need_neither_torch_nor_pyplot() -> None:
    code = "import sys, train_then_compress.analysis.figures; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
