"""``conf/steps``: the settings of each compression method, and which strengths it takes.

A recipe such as ``prune60+quant4`` is a sequence of steps; a step is a method and its strength. Each method is one
dataclass here, with ``check`` (is this strength possible?) and ``increments`` (the chain of strengths on the way).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from train_then_compress.config.base import ConfigError, config_dataclass, reject


class StepConfig(Protocol):
    """What every method's settings can say of a strength."""

    last: ClassVar[bool]

    def check(self, strength: int, width: int) -> None:
        """Raise `ConfigError` unless the method takes this strength and fits a model of this width."""

    def increments(self, strength: int) -> list[int]:
        """The strengths whose stages lead to this one, itself last; recipes share these stages."""


@config_dataclass
class Quant:
    """Round-to-nearest uniform quantization of the weights (no data, no training).

    Groups lie along a matrix's inputs; a matrix with fewer inputs than ``group_size`` has one group a row.
    """

    last: ClassVar[bool] = True
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = Field(32, ge=2)
    embeddings: bool = True

    def check(self, strength: int, width: int) -> None:
        """Bits: 8, 6, 4, 3 or 2; groups must divide the inputs of every matrix that has more."""
        if strength not in (8, 6, 4, 3, 2):
            raise ConfigError(f"recipes: quant{strength}: bits must be one of 8, 6, 4, 3, 2")
        inputs = (width, 4 * width)
        if self.granularity == "group" and any(n > self.group_size and n % self.group_size for n in inputs):
            raise reject("steps.quant.group_size", self.group_size,
                         f"must divide the matrices' inputs (model.width={width} and 4 x that) "
                         "or exceed them")  # fmt: skip

    def increments(self, strength: int) -> list[int]:
        """Quantization happens at once."""
        return [strength]


@config_dataclass
class Recovery:
    """Training after pruning: a constant rate of ``lr_factor`` times the pretraining peak, in at most
    ``max_steps`` steps for each ``increment`` of sparsity, until ``target`` of the dense validation accuracy is back
    (looked at every ``check_every`` steps)."""

    target: float = Field(0.995, gt=0, le=1)
    max_steps: int = Field(200, ge=0)
    check_every: int = Field(25, ge=1)
    lr_factor: float = Field(0.3, gt=0, le=10)


@config_dataclass
class Prune:
    """Magnitude pruning (Li et al. 2020, section 4): zero the smallest weights, recover, again.

    ``scope``: one threshold per weight matrix (``layer``) or one for all (``global``).
    """

    last: ClassVar[bool] = False
    increment: int = Field(15, ge=1, le=99)
    scope: Literal["layer", "global"] = "layer"
    embeddings: bool = True
    recovery: Recovery = Field(default_factory=Recovery)

    def check(self, strength: int, width: int) -> None:
        """Per cent of the original weights, above 0 and below 100."""
        if not 0 < strength < 100:
            raise ConfigError(f"recipes: pruning {strength} %: must lie between 1 and 99 per cent of the weights")

    def increments(self, strength: int) -> list[int]:
        """15, 30, .. up to ``strength``: one chain for every target."""
        return [*range(self.increment, strength, self.increment), strength]


@config_dataclass
class OneShot(Prune):
    """All pruning at once, for comparison: the same total cap of recovery steps as the iterative chain."""

    def increments(self, strength: int) -> list[int]:
        """A single increment."""
        return [strength]


STEPS: dict[str, Any] = {"quant": Quant, "prune": Prune, "oneshot": OneShot}
