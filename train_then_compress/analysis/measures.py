"""What each task is judged by: along training, at its points, and against which model that has learned nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Measure:
    """A measure of quality: ``scale`` turns the column's unit into the axis's ``unit``.

    Points worse than ``tolerance`` times the worst dense model are drawn at the edge.
    """

    column: str
    name: str
    tolerance: float
    higher_is_better: bool = False
    logarithmic: bool = False
    scale: float = 1.0
    unit: str = ""

    @property
    def title(self) -> str:
        """The name at the beginning of a line."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def label(self) -> str:
        """The axis's label."""
        direction = f"{'higher' if self.higher_is_better else 'lower'} is better"
        remarks = [self.unit, "log scale" if self.logarithmic else "", direction]
        return f"{self.name} ({', '.join(filter(None, remarks))})"

    def reaches(self, values: pd.Series[float], other: pd.Series[float] | float) -> pd.Series[bool]:
        """Where ``values`` are better than ``other``; false where either is unknown."""
        return values > other if self.higher_is_better else values < other


@dataclass(frozen=True)
class TaskMeasures:
    """``curve``: of the validation split along training; ``points``: of the test split, the first ranks the points.

    ``baseline`` names the model that has learned nothing (a row of the table); its values stand, by split, under
    ``recorded`` in the record of a run's corpus. A run has learned something where its validation measure beats
    ``share`` of the baseline's; ``too_little`` says in words that it has not.
    """

    curve: Measure
    points: list[Measure]
    baseline: str
    recorded: str
    share: float
    too_little: str


_ACCURACY = {"tolerance": 0.7, "higher_is_better": True, "scale": 100.0, "unit": "%"}
MEASURES = {
    "mlm": TaskMeasures(
        curve=Measure("perplexity", "validation perplexity", 2.5, logarithmic=True),
        points=[
            Measure("test_perplexity", "test perplexity", 2.5, logarithmic=True),
            Measure("test_accuracy", "masked-token test accuracy", **_ACCURACY),  # type: ignore[arg-type]
        ],
        baseline="unigram",
        recorded="unigram_perplexity",
        share=0.5,
        too_little="validation perplexity not below half of the unigram model's",
    ),
    "classification": TaskMeasures(
        curve=Measure("accuracy", "validation accuracy", **_ACCURACY),  # type: ignore[arg-type]
        points=[
            Measure("test_accuracy", "test accuracy", **_ACCURACY),  # type: ignore[arg-type]
            Measure("test_loss", "test loss", 2.0, unit="nats"),
        ],
        baseline="majority",
        recorded="majority_accuracy",
        share=1.0,
        too_little="validation accuracy not above that of the most frequent label",
    ),
    "translation": TaskMeasures(
        curve=Measure("bleu", "validation BLEU", 0.7, higher_is_better=True),
        points=[
            Measure("test_bleu", "test BLEU", 0.7, higher_is_better=True),
            Measure("test_chrf", "test chrF", 0.7, higher_is_better=True),
        ],
        baseline="copy",
        recorded="copy_bleu",
        share=1.0,
        too_little="validation BLEU not above that of copying the source",
    ),
}
