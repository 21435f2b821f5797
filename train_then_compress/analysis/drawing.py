"""What the figures share: the page, axes with units, colours that keep their order in grey, labels, files."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

Unit = Literal["count", "bytes", "time", "plain"]


@dataclass(frozen=True)
class Quantity:
    """What a logarithmic axis shows: a column, its name, and the unit in which its ticks are written.

    A cost of which more is better has its axis the other way round, so that cheap is always on the left.
    """

    column: str
    name: str
    unit: Unit
    higher_is_better: bool = False


#: A hash salt and no date: the same records give the same SVG, byte for byte. Text stays text.
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "train_then_compress", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.6, "axes.edgecolor": "0.3", "xtick.color": "0.2", "ytick.color": "0.2",
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "lines.linewidth": 1.4,
}  # fmt: skip
#: The page in inches: its least width, what surrounds the axes, and the axes' least width and height.
_WIDTH, _LEFT, _TOP, _BOTTOM, _NOTE_LINE, _LEAST_WIDTH, _LEAST_HEIGHT = 7.2, 0.7, 0.62, 0.56, 0.15, 3.9, 3.3
#: Characters of the subtitle and of a note in one line of the least width.
_SUBTITLE, _NOTE = 104, 122
_MARKERS: list[str] = [*"osD^vPX<>*hp8dH", r"$\clubsuit$", r"$\spadesuit$"]
_DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1))]
_MOST_TICKS = 7
#: Round values for ticks, from few to many: seconds, and mantissas of everything else.
_TIMES: list[list[float]] = [
    [1, 10, 60, 600, 3600, 36000, 864000],
    [1, 10, 30, 60, 300, 600, 1800, 3600, 10800, 43200, 86400, 864000],
    [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 432000],
    [15, 30, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200, 10800],
]
_MANTISSAS: list[list[float]] = [
    [1],
    [1, 3],
    [1, 2, 5],
    [1, 1.5, 2, 3, 5, 7],
    [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9],
]


@contextmanager
def page(title: str, subtitle: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one pair of axes in the house style, which holds inside the ``with`` block."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _TOP + _LEAST_HEIGHT + _BOTTOM))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(f"{title}\n{subtitle}", loc="left")  # a place for both; lay_out draws them
        yield figure, axes


def lay_out(figure: Figure, axes: Axes, legends: Sequence[tuple[str, list[Line2D]]], notes: Sequence[str]) -> None:
    """Give everything its place: title above, legends (title, entries) to the right, notes below, the axes between.

    The page grows with its legends and notes, so that nothing covers anything.
    """
    title, subtitle = axes.get_title(loc="left").split("\n")
    axes.set_title("", loc="left")
    drawn = [
        figure.legend(handles=entries, title=heading, loc="upper left", alignment="left", borderaxespad=0, borderpad=0,
                      handlelength=2.6, labelspacing=0.45, ncols=1 + len(entries) // 28)
        for heading, entries in legends
    ]  # fmt: skip
    boxes = [legend.get_window_extent() for legend in drawn]
    aside = max((box.width / figure.dpi for box in boxes), default=0.0)
    width = max(_WIDTH, _LEFT + _LEAST_WIDTH + aside + 0.3)
    lines = [line for note in notes if note for line in textwrap.wrap(note, int(_NOTE * width / _WIDTH))]
    subtitle_lines = textwrap.wrap(subtitle, int(_SUBTITLE * width / _WIDTH))
    above = _TOP + _NOTE_LINE * (len(subtitle_lines) - 1)
    between = 0.18
    legend_heights = [box.height / figure.dpi + between for box in boxes]
    axes_height = max(_LEAST_HEIGHT, sum(legend_heights) - _BOTTOM + between)
    bottom = _BOTTOM + _NOTE_LINE * len(lines) + (0.06 if lines else 0)
    height = above + axes_height + bottom
    figure.set_size_inches(width, height)
    right = width - aside - 0.3
    axes.set_position((_LEFT / width, bottom / height, (right - _LEFT) / width, axes_height / height))
    top = height - above
    for legend, used in zip(drawn, legend_heights, strict=True):
        legend.get_title().set_fontweight("bold")
        legend.set_bbox_to_anchor(((right + 0.18) / width, top / height))
        top -= used
    edge = 0.1 / width
    figure.text(edge, 1 - 0.1 / height, title, va="top", fontsize=11, fontweight="bold")
    figure.text(edge, 1 - 0.31 / height, "\n".join(subtitle_lines), va="top", fontsize=8.5, color="0.25")
    figure.text(edge, 0.08 / height, "\n".join(lines), va="bottom", fontsize=7.5, color="0.3", linespacing=1.35)


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png`` (150 dots per inch), each as a whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in ("svg", "png"):
        path = directory / f"{name}.{suffix}"
        temporary = directory / f".{path.name}.{os.getpid()}"
        try:
            with matplotlib.rc_context(_STYLE):
                figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(path)
    return written


def size_colours(count: int) -> list[str]:
    """Colours from light (small) to dark (large), monotone in luminance so that grey keeps the order."""
    shades = np.linspace(0.84, 0.0, count) if count > 1 else [0.3]
    colour_of = matplotlib.colormaps["viridis"]
    return [to_hex(colour_of(float(shade))) for shade in shades]


def distinct_colours(count: int) -> list[str]:
    """Colours without an order, as different as so many can be."""
    colour_of = matplotlib.colormaps["tab20"]
    return [to_hex(colour_of(2 * index % 20 + index // 10 % 2)) for index in range(count)]


def marker(index: int) -> str:
    """The marker of the n-th model or recipe family."""
    return _MARKERS[index % len(_MARKERS)]


def dashes(index: int) -> Any:
    """The line style of the n-th model."""
    return _DASHES[index % len(_DASHES)]


def humane(value: float, unit: Unit) -> str:
    """``30 s``, ``5 min``, ``2 h``; ``400 kB`` (1 kB = 1000 bytes); ``20k``, ``3M``, ``10T``; ``plain``: the number."""
    if unit == "time":
        for seconds, name in ((86400, "d"), (3600, "h"), (60, "min")):
            if value >= 2 * seconds or (value >= seconds and value % seconds == 0):
                return f"{value / seconds:g} {name}"
        return f"{value:g} s"
    if unit == "plain":
        return f"{value:g}"
    power = int(np.clip(np.floor(np.log10(abs(value)) / 3 + 1e-9), 0, 6)) if value else 0
    prefix = ("", "k", "M", "G", "T", "P", "E")[power]
    return f"{value / 1000**power:.4g}{' ' + prefix + 'B' if unit == 'bytes' else prefix}"


def log_ticks(low: float, high: float, unit: Unit) -> list[float]:
    """At most seven round values in [low, high], as many as fit, spread evenly in their logarithm."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    round_numbers = [[mantissa * 10.0**power for power in powers for mantissa in chosen] for chosen in _MANTISSAS]
    choices = _TIMES if unit == "time" else round_numbers
    inside = [[value for value in values if low <= value <= high] for values in choices]
    fitting = max((values for values in inside if len(values) <= _MOST_TICKS), key=len, default=[])
    if len(fitting) >= 3:
        return fitting
    linear = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(value), 9) for value in linear if low <= value <= high]


def log_axis(axes: Axes, which: Literal["x", "y"], low: float, high: float, unit: Unit) -> None:
    """A logarithmic axis over [low, high] with round, human ticks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    ticks = log_ticks(low, high, unit)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([humane(tick, unit) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def ticks_at(axes: Axes, values: Sequence[float]) -> None:
    """Label an x axis of few values at just these."""
    axes.xaxis.set_major_locator(FixedLocator([float(value) for value in values]))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{value:g}" for value in values]))


def padded(values: Any, share: float = 0.06) -> tuple[float, float]:
    """The range of positive values, widened at each end by a share of its logarithmic extent."""
    low, high = float(np.min(values)), float(np.max(values))
    factor = max((high / low) ** share, 1.02)
    return low / factor, high * factor


def label_points(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]], obstacles: np.ndarray, below: bool
) -> None:
    """Name those points whose name finds room to their left, below them or (not ``below``) above; call it last.

    ``obstacles``: [count, 2], data coordinates of the marks that must stay visible.
    """
    dot = figure.dpi / 72
    marks = axes.transData.transform(obstacles)
    taken = np.hstack([marks - 3.5 * dot, marks + 3.5 * dot])  # [count, 4]: left, bottom, right, top in pixels
    frame = axes.get_window_extent()
    sign = -1 if below else 1
    for x, y, text in labels:
        note = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize=7.5, color="0.1", zorder=6, ha="right",
            va="top" if below else "bottom",
            arrowprops={"arrowstyle": "-", "color": "0.55", "linewidth": 0.5, "shrinkB": 3},
        )  # fmt: skip
        size = Text.get_window_extent(note)  # without the arrow
        place_x, place_y = axes.transData.transform((x, y))
        for dx, dy in [(-4, 3), (-3, 8), (-2, 14), (-8, 14), (-2, 20), (-14, 20), (-2, 27), (-20, 27)]:
            right, near = place_x + dx * dot, place_y + sign * dy * dot
            left = right - size.width
            bottom, top = (near - size.height, near) if below else (near, near + size.height)
            is_inside = left >= frame.x0 + 8 * dot and frame.y0 <= bottom and top <= frame.y1
            beside = (taken[:, 0] >= right) | (taken[:, 2] <= left) | (taken[:, 1] >= top) | (taken[:, 3] <= bottom)
            if is_inside and beside.all():
                note.set_position((dx, sign * dy))
                taken = np.vstack([taken, [left - 4 * dot, bottom, right + 4 * dot, top]])
                break
        else:
            note.remove()
