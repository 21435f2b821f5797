"""Settings of the methods that zero weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train_then_compress.config.base import ConfigError, config_dataclass, reject
from train_then_compress.config.model import ModelConfig
from train_then_compress.config.steps.base import Phase, Recovery, StepConfig, check_share


@config_dataclass
class Prune(StepConfig):
    """Magnitude pruning (Li et al. 2020, section 4): zero the smallest weights, recover, again.

    ``scope``: one threshold per weight matrix (``layer``) or one for all (``global``).
    """

    phase: ClassVar[Phase] = "pruning"
    explained: ClassVar[str] = "pruneP: P % of the weights zero, pruned step by step"
    increment: int = Field(15, ge=1, le=99)
    scope: Literal["layer", "global"] = "layer"
    embeddings: bool = True
    recovery: Recovery = Field(default_factory=Recovery)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent of the original weights, above 0 and below 100."""
        check_share(strength, "pruning")

    def increments(self, strength: int) -> list[int]:
        """15, 30, .. up to ``strength``: one chain for every target."""
        return [*range(self.increment, strength, self.increment), strength]


@config_dataclass
class OneShot(Prune):
    """All pruning at once, for comparison: the same total cap of recovery steps as the iterative chain."""

    explained: ClassVar[str] = "oneshotP: P % of the weights zero, pruned at once"

    def increments(self, strength: int) -> list[int]:
        """A single increment."""
        return [strength]


@config_dataclass
class SparseTraining:
    """Training of ``steps`` optimizer steps while masks grow; the rate falls linearly from ``lr_factor`` times the
    pretraining peak to zero.

    The sparsity rises by a cubic law (Zhu & Gupta 2018, equation 1) between the shares ``begin`` and ``ramp`` of the
    steps, in stairs of ``every`` steps, after which the masks are computed again.
    """

    steps: int = Field(600, ge=1)
    begin: float = Field(0.1, ge=0, lt=1)
    ramp: float = Field(0.7, gt=0, le=1)
    every: int = Field(10, ge=1)
    lr_factor: float = Field(0.3, gt=0, le=10)

    @property
    def first(self) -> int:
        """The step after which the sparsity begins to rise: t0 of equation 1."""
        return round(self.begin * self.steps)

    @property
    def rises(self) -> int:
        """How often it rises: n of equation 1."""
        return (round(self.ramp * self.steps) - self.first) // self.every

    def check(self, method: str) -> None:
        """Raise `ConfigError` unless the sparsity rises at least once."""
        if self.rises < 1:
            raise reject(f"steps.{method}.training.every", self.every,
                         f"the sparsity must rise at least once between training.begin={self.begin:g} and "
                         f"training.ramp={self.ramp:g} of training.steps={self.steps}")  # fmt: skip


@config_dataclass
class MovementTraining(SparseTraining):
    """Masks from new scores after every step (Sanh et al. 2020, section 4)."""

    every: int = Field(1, ge=1)


@config_dataclass
class Gradual(StepConfig):
    """Gradual magnitude pruning (Zhu & Gupta 2018): the smallest weights go during one training.

    ``scope``: one threshold per weight matrix (``layer``) or one for all (``global``).
    """

    phase: ClassVar[Phase] = "pruning"
    explained: ClassVar[str] = "gradualP: P % of the weights zero, the smallest, more and more during one training"
    scope: Literal["layer", "global"] = "layer"
    embeddings: bool = True
    training: SparseTraining = Field(default_factory=SparseTraining)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent of the original weights, above 0 and below 100."""
        check_share(strength, "pruning")
        self.training.check("gradual")


@config_dataclass
class Movement(StepConfig):
    """Movement pruning (Sanh et al. 2020): weights that finetuning moves towards zero go during one training.

    ``scope``: the same share of every weight matrix (``layer``, the paper's hard movement pruning) or of all together.
    """

    phase: ClassVar[Phase] = "pruning"
    explained: ClassVar[str] = "movementP: P % of the weights zero, those that finetuning moves towards zero"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    scope: Literal["layer", "global"] = "layer"
    embeddings: bool = False
    training: MovementTraining = Field(default_factory=MovementTraining)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent of the original weights, above 0 and below 100."""
        check_share(strength, "pruning")
        self.training.check("movement")


@config_dataclass
class Wanda(StepConfig):
    """Pruning by weights and activations (Sun et al. 2024), the same share of every row; embeddings by magnitude."""

    phase: ClassVar[Phase] = "pruning"
    explained: ClassVar[str] = "wandaP: P % of each row's weights zero, by magnitude times norm of the inputs"
    impls: ClassVar[tuple[str, ...]] = ("native",)
    calibration_batches: int = Field(8, ge=1)
    embeddings: bool = True
    recovery: Recovery = Field(default_factory=Recovery)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent of the original weights, above 0 and below 100."""
        check_share(strength, "pruning")


@config_dataclass
class Semi(StepConfig):
    """2:4 semi-structured sparsity (Mishra et al. 2021) of the linear layers. Its speed is simulated only.

    ``criterion``: what the two weights that go are the lowest in; ``movement`` goes by its ``training`` in place of
    ``recovery`` and, as there, is for classification only.
    """

    phase: ClassVar[Phase] = "pruning"
    explained: ClassVar[str] = "semi50: 2 of every 4 weights zero (2:4); speed simulated only, no engine here uses it"
    criterion: Literal["magnitude", "wanda", "movement"] = "magnitude"
    calibration_batches: int = Field(8, ge=1)
    recovery: Recovery = Field(default_factory=Recovery)
    training: MovementTraining = Field(default_factory=MovementTraining)

    def check(self, strength: int, model: ModelConfig) -> None:
        """50 per cent; every matrix has ``model.width`` inputs or four times as many."""
        if strength != 50:
            raise ConfigError(f"recipes: semi{strength}: 2 of every 4 weights are zero: the strength must be 50")
        if model.width % 4:
            raise reject("model.width", model.width, "semi50 needs a multiple of 4, the group in which 2 weights go")
        if self.criterion == "wanda" and model.impl not in Wanda.impls:
            raise reject("steps.semi.criterion", self.criterion, f"works for model.impl={', '.join(Wanda.impls)} only")
        self.training.check("semi")

    def check_task(self, task: str) -> None:
        """Movement pruning is finetuning."""
        if self.criterion == "movement" and task not in Movement.tasks:
            raise reject("steps.semi.criterion", self.criterion, f"works for task={', '.join(Movement.tasks)} only")
