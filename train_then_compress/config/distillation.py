"""``conf/distill``: the teacher of a run, and how a teacher teaches (also in the step ``distill``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train_then_compress.config.base import config_dataclass, reject
from train_then_compress.config.model import ModelShape


@config_dataclass
class Teaching:
    """What a student learns from a teacher, beside its task.

    ``alpha`` is the share of the teacher's predictions, softened by ``temperature`` (Hinton et al. 2015, section 2;
    DistilBERT); 1 - ``alpha`` that of the task's own loss. ``hints`` add states from inside: ``hidden`` states and
    embeddings (TinyBERT, Jiao et al. 2020) or self-attention ``relations`` (MiniLMv2, Wang et al. 2021), of every
    layer of the student (``layer_map=uniform``, as TinyBERT) or of the ``last`` alone (MiniLMv2).
    """

    temperature: float = Field(2.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)
    hints: Literal["none", "hidden", "relations"] = "none"
    layer_map: Literal["uniform", "last"] = "uniform"

    def check_impl(self, key: str, model: ModelShape) -> None:
        """Hints are states of our own layers; raises `ConfigError` naming ``key`` for a student that has others."""
        if self.hints != "none" and model.impl != "native":
            raise reject(f"{key}.hints", self.hints, f"model.impl={model.impl} gives no hints; model.impl=native does")


@config_dataclass
class DistillConfig(Teaching):
    """``teacher``: the directory of a finished run of the same task, whose dense model teaches this run's."""

    teacher: str | None = None

    @model_validator(mode="after")
    def _has_teacher(self) -> DistillConfig:
        if not self.teacher:
            raise reject("distill.teacher", self.teacher, "the directory of a finished run is needed, "
                         "e.g. runs/depth/mlm-d4-w64-seconds300-s0-1a2b3c4d")  # fmt: skip
        return self
