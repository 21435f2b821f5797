"""Settings of the steps that train what stands, without compressing it further."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from train_then_compress.config.base import config_dataclass
from train_then_compress.config.distillation import Teaching
from train_then_compress.config.model import ModelConfig
from train_then_compress.config.steps.base import Phase, StepConfig


@config_dataclass
class Distill(Teaching, StepConfig):
    """Train the compressed model for ``steps`` with the run's dense model as its teacher.

    The learning rate falls from ``lr_factor`` times the dense model's peak to zero; pruned weights stay zero.
    """

    phase: ClassVar[Phase] = "training"
    explained: ClassVar[str] = "distill: trained with the dense model as teacher"
    has_strength: ClassVar[bool] = False
    steps: int = Field(500, ge=1)
    lr_factor: float = Field(0.3, gt=0, le=10)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Hints are taken from inside our own layers."""
        self.check_impl("steps.distill", model)


@config_dataclass
class SeqDistill(StepConfig):
    """Train the compressed translator for ``steps`` on what the dense model says (Kim & Rush 2016, section 3.2).

    Its best translations by beam search (``beam`` hypotheses) of the first ``sentences`` training sources are the
    targets. Rate and pruned weights as in `Distill`.
    """

    phase: ClassVar[Phase] = "training"
    explained: ClassVar[str] = "seqdistill: trained on the dense model's translations by beam search"
    has_strength: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("translation",)
    sentences: int = Field(10_000, ge=1)
    beam: int = Field(5, ge=1, le=16)
    steps: int = Field(500, ge=1)
    lr_factor: float = Field(0.3, gt=0, le=10)
