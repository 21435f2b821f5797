"""Settings of the steps that train what stands, without compressing it further."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from train_then_compress.config.base import config_dataclass
from train_then_compress.config.distillation import Teaching
from train_then_compress.config.model import RobertaConfig
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

    def check(self, strength: int, model: RobertaConfig) -> None:
        """Hints are taken from inside our own layers."""
        self.check_impl("steps.distill", model)
