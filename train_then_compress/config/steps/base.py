"""What every method's settings have, and what several of them share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train_then_compress.config.base import ConfigError, config_dataclass
from train_then_compress.config.model import ModelConfig

#: In a recipe these follow each other: what changes shapes, what zeroes weights, what stores them in fewer bits.
#: ``training`` may stand anywhere before quantization.
Phase = Literal["architecture", "pruning", "training", "quantization"]
PHASES: tuple[Phase, ...] = ("architecture", "pruning", "quantization")


@config_dataclass
class StepConfig:
    """A method's settings.

    ``phase`` orders the steps of a recipe; ``explained`` is the method's line below a figure; ``has_strength`` is
    false for a step that is written without a number; ``tasks`` names the tasks it makes sense for, ``impls`` the
    values of ``model.impl``: what looks into layers or changes their shapes needs our own.
    """

    phase: ClassVar[Phase]
    explained: ClassVar[str]
    has_strength: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("mlm", "classification", "translation")
    impls: ClassVar[tuple[str, ...]] = ("native", "fairseq")

    def check(self, strength: int, model: ModelConfig) -> None:
        """Raise `ConfigError` unless the method takes this strength and fits this model."""

    def check_task(self, task: str) -> None:
        """Raise `ConfigError` where a setting does not suit a task that the method itself is for."""

    def increments(self, strength: int) -> list[int]:
        """The strengths whose stages lead to this one, itself last; recipes share these stages."""
        return [strength]


@config_dataclass
class Recovery:
    """Training after pruning: a constant rate of ``lr_factor`` times the pretraining peak, in at most
    ``max_steps`` steps for each ``increment`` of sparsity, until ``target`` of the dense validation accuracy is back
    (looked at every ``check_every`` steps). ``distill``: the dense model teaches meanwhile, as in the step ``distill``
    with its default settings."""

    target: float = Field(0.995, gt=0, le=1)
    max_steps: int = Field(200, ge=0)
    check_every: int = Field(25, ge=1)
    lr_factor: float = Field(0.3, gt=0, le=10)
    distill: bool = False


def check_share(strength: int, verb: str, of: str = "of the weights") -> None:
    """Per cent of something, above 0 and below 100; raises `ConfigError`."""
    if not 0 < strength < 100:
        raise ConfigError(f"recipes: {verb} {strength} %: must lie between 1 and 99 per cent {of}")
