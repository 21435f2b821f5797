"""``conf/steps``: the settings of each compression method, and which strengths it takes.

A recipe such as ``prune60+quant4`` is a sequence of steps; a step is a method and its strength. Each method is one
dataclass here; a method named ``quant`` is the module ``compression.quant`` and the file ``conf/steps/quant.yaml``.
"""

from __future__ import annotations

from train_then_compress.config.steps.architecture import Exit, Structured, Svd
from train_then_compress.config.steps.base import Recovery, StepConfig
from train_then_compress.config.steps.pruning import (
    Gradual,
    Movement,
    MovementTraining,
    OneShot,
    Prune,
    Semi,
    SparseTraining,
    Wanda,
)
from train_then_compress.config.steps.quantization import Gptq, KMeans, Lsq, Quant, Smooth
from train_then_compress.config.steps.training import Distill, SeqDistill

__all__ = [
    "STEPS", "Distill", "Exit", "Gptq", "Gradual", "KMeans", "Lsq", "Movement", "MovementTraining", "OneShot",
    "Prune", "Quant", "Recovery", "Semi", "SeqDistill", "Smooth", "SparseTraining", "StepConfig", "Structured", "Svd",
    "Wanda",
]  # fmt: skip

STEPS: dict[str, type[StepConfig]] = {
    "quant": Quant, "kmeans": KMeans, "gptq": Gptq, "smooth": Smooth, "lsq": Lsq, "prune": Prune,
    "oneshot": OneShot, "gradual": Gradual, "movement": Movement, "wanda": Wanda, "semi": Semi,
    "structured": Structured, "svd": Svd, "exit": Exit, "distill": Distill,
    "seqdistill": SeqDistill,
}  # fmt: skip
