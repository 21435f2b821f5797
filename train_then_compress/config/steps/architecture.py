"""Settings of the methods that change the architecture."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train_then_compress.config.base import ConfigError, config_dataclass, reject
from train_then_compress.config.model import ModelConfig
from train_then_compress.config.steps.base import Phase, Recovery, StepConfig, check_share

Unit = Literal["heads", "ffn", "layers"]


@config_dataclass
class Structured(StepConfig):
    """Structured pruning: whole attention heads, FFN units or layers are taken away, recovered from, and again.

    ``importance``: ``taylor``, how fast the loss changes with a gate on the unit, on ``calibration_batches`` training
    batches (Molchanov et al. 2019, equation 8; Michel et al. 2019, section 4.1), or ``magnitude``, the norm of its
    weights. ``scope``: the same share of heads and FFN units in each layer (``layer``), or the least important of all
    layers (``global``). Shares are of the original numbers; every attention keeps a head, every layer an FFN unit. An
    encoder and a decoder lose the same share of their layers.
    """

    phase: ClassVar[Phase] = "architecture"
    explained: ClassVar[str] = "structuredP: P % of heads and FFN units (or layers) removed, step by step"
    impls: ClassVar[tuple[str, ...]] = ("native",)
    units: list[Unit] = Field(default_factory=lambda: list[Unit](("heads", "ffn")), min_length=1)
    importance: Literal["taylor", "magnitude"] = "taylor"
    scope: Literal["layer", "global"] = "layer"
    increment: int = Field(15, ge=1, le=99)
    calibration_batches: int = Field(16, ge=1)
    recovery: Recovery = Field(default_factory=Recovery)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent above 0 and below 100; something must go, and a layer must stay."""
        check_share(strength, "removing", "of the units")
        share, layers = strength / 100, 1 if self.scope == "layer" else sum(model.depths)
        removed = {
            "heads": min(round(share * model.heads * layers), (model.heads - 1) * layers),
            "ffn": round(share * 4 * model.width * layers),
            "layers": sum(round(share * depth) for depth in model.depths),
        }
        if "layers" in self.units and any(round(share * depth) == depth for depth in model.depths):
            raise reject("steps.structured.units", self.units, f"structured{strength} would remove every layer of "
                         f"model.depth={model.depth_name}; at least one must stay")  # fmt: skip
        if not any(removed[unit] for unit in self.units):
            raise reject("steps.structured.units", self.units, f"structured{strength} rounds to no unit of this model: "
                         f"{model.heads} heads a layer, model.depth={model.depth_name}")  # fmt: skip

    def increments(self, strength: int) -> list[int]:
        """15, 30, .. up to ``strength``: one chain for every target."""
        return [*range(self.increment, strength, self.increment), strength]


@config_dataclass
class Svd(StepConfig):
    """Linear layers as products of two smaller ones, by truncated singular value decomposition.

    ``rank``: the factors hold ``strength`` per cent of the matrix's weights (``bytes``), or as few singular values are
    kept as hold ``strength`` per cent of the sum of their squares (``energy``); a matrix whose factors would not be
    smaller stays as it is. ``weighting``: least error of the weights (``none``), or of the outputs on
    ``calibration_batches`` training batches (``activations``; Wang et al. 2024, SVD-LLM). The embedding, which has
    two kinds of outputs, is never weighted.
    """

    phase: ClassVar[Phase] = "architecture"
    explained: ClassVar[str] = "svdP: linear layers as two of low rank, P % of their weights"
    impls: ClassVar[tuple[str, ...]] = ("native",)
    rank: Literal["bytes", "energy"] = "bytes"
    weighting: Literal["none", "activations"] = "activations"
    calibration_batches: int = Field(16, ge=1)
    embeddings: bool = False
    recovery: Recovery = Field(default_factory=Recovery)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Per cent that is kept, above 0 and below 100."""
        check_share(strength, "keeping", "of the weights" if self.rank == "bytes" else "of the squared singular values")


@config_dataclass
class Exit(StepConfig):
    """Early exit (DeeBERT, Xin et al. 2020; BranchyNet): a head after every ``every`` layers, trained for ``steps``.

    ``trunk``: ``frozen`` trains the new heads alone (DeeBERT, section 3.2), ``joint`` everything on the sum of all
    exits' losses (BranchyNet). The learning rate falls from ``lr_factor`` times the finetuning peak to zero.
    """

    phase: ClassVar[Phase] = "architecture"
    explained: ClassVar[str] = "exitC: an example leaves at the first head that is C % sure"
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    impls: ClassVar[tuple[str, ...]] = ("native",)
    every: int = Field(1, ge=1)
    trunk: Literal["frozen", "joint"] = "frozen"
    steps: int = Field(500, ge=1)
    lr_factor: float = Field(1.0, gt=0, le=10)

    def check(self, strength: int, model: ModelConfig) -> None:
        """A confidence in per cent, above 0 and below 100; at least one exit inside the model."""
        if not 0 < strength < 100:
            raise ConfigError(f"recipes: exit{strength}: the confidence must lie between 1 and 99 per cent")
        if self.every >= model.depth:
            raise reject("steps.exit.every", self.every,
                         f"must be below model.depth={model.depth}, so that an exit lies inside")  # fmt: skip
