"""Settings of the methods that store weights in fewer bits."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from train_then_compress.config.base import ConfigError, config_dataclass, reject
from train_then_compress.config.model import ModelConfig
from train_then_compress.config.steps.base import Phase, StepConfig


@config_dataclass
class Quant(StepConfig):
    """Round-to-nearest uniform quantization of the weights (no data, no training).

    Groups lie along a matrix's inputs; a matrix with fewer inputs than ``group_size`` has one group a row.
    """

    phase: ClassVar[Phase] = "quantization"
    explained: ClassVar[str] = "quantB: weights of B bits"
    method: ClassVar[str] = "quant"
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = Field(32, ge=2)
    embeddings: bool = True

    def check(self, strength: int, model: ModelConfig) -> None:
        """Bits: 8, 6, 4, 3 or 2; groups must divide the inputs of every matrix that has more."""
        if strength not in (8, 6, 4, 3, 2):
            raise ConfigError(f"recipes: {self.method}{strength}: bits must be one of 8, 6, 4, 3, 2")
        if self.granularity == "group":
            check_groups(self.method, self.group_size, model)


@config_dataclass
class Gptq(Quant):
    """GPTQ (Frantar et al. 2023): rounding that makes each error good in the weights still to be rounded.

    ``activation_order``: inputs of large second moment first. ``damping``: what is added to the second moments, as a
    share of their mean. ``calibration_batches``: training batches whose text the layers' inputs are taken from.
    """

    explained: ClassVar[str] = "gptqB: weights of B bits, rounded by GPTQ"
    impls: ClassVar[tuple[str, ...]] = ("native",)
    method: ClassVar[str] = "gptq"
    granularity: Literal["channel", "group"] = "group"
    activation_order: bool = False
    damping: float = Field(0.01, ge=1e-6, le=1)
    calibration_batches: int = Field(8, ge=1)


@config_dataclass
class KMeans(StepConfig):
    """k-means quantization (Han et al. 2016): weights share the values of a codebook.

    A codebook for each matrix (``tensor``), row (``channel``) or group; at most ``iterations`` of Lloyd's algorithm.
    """

    phase: ClassVar[Phase] = "quantization"
    explained: ClassVar[str] = "kmeansB: weights in codes of B bits, whose values k-means found"
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    group_size: int = Field(256, ge=2)
    embeddings: bool = True
    iterations: int = Field(300, ge=1)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Bits: 2 to 8; groups must divide the inputs of every matrix that has more, and outnumber their codebook."""
        if not 2 <= strength <= 8:
            raise ConfigError(f"recipes: kmeans{strength}: bits must lie between 2 and 8")
        if self.granularity == "tensor":
            return
        weights = model.width
        if self.granularity == "group":
            check_groups("kmeans", self.group_size, model)
            weights = min(self.group_size, model.width)
        if weights < 2**strength:
            raise reject("steps.kmeans.granularity", self.granularity,
                         f"a codebook of {2**strength} values (kmeans{strength}) for {weights} weights; "
                         "give fewer bits or larger groups")  # fmt: skip


def check_groups(method: str, group_size: int, model: ModelConfig) -> None:
    """Groups must divide the inputs of every matrix that has more than one of them; raises `ConfigError`."""
    inputs = (model.width, 4 * model.width)
    if any(n > group_size and n % group_size for n in inputs):
        raise reject(f"steps.{method}.group_size", group_size,
                     f"must divide the matrices' inputs (model.width={model.width} and 4 x that) "
                     "or exceed them")  # fmt: skip


@config_dataclass
class Smooth(StepConfig):
    """SmoothQuant (Xiao et al. 2023): int8 weights and activations, whose quantization is simulated.

    ``alpha`` is the share of the activations' magnitude that goes to the weights; without it nothing is smoothed (plain
    W8A8, for comparison). Activations are quantized with the range of each token (``dynamic``) or one that calibration
    found (``static``); ``granularity`` and ``embeddings`` are about weights.
    """

    phase: ClassVar[Phase] = "quantization"
    explained: ClassVar[str] = "smooth8: weights and activations of 8 bits, smoothed (activations simulated)"
    impls: ClassVar[tuple[str, ...]] = ("native",)
    alpha: float | None = Field(0.5, ge=0, le=1)
    activations: Literal["dynamic", "static"] = "dynamic"
    granularity: Literal["tensor", "channel"] = "tensor"
    calibration_batches: int = Field(32, ge=1)
    embeddings: bool = True

    def check(self, strength: int, model: ModelConfig) -> None:
        """8 bits only."""
        if strength != 8:
            raise ConfigError(f"recipes: smooth{strength}: bits must be 8, of weights and activations")


@config_dataclass
class Lsq(StepConfig):
    """Quantization-aware training of the weights with learned step sizes (Esser et al. 2020).

    ``max_steps`` training steps, at a rate that falls linearly from ``lr_factor`` times the pretraining peak to zero.
    Weights share a step size by matrix (as in the paper), row or group.
    """

    phase: ClassVar[Phase] = "quantization"
    explained: ClassVar[str] = "lsqB: weights of B bits, trained with learned step sizes"
    granularity: Literal["tensor", "channel", "group"] = "group"
    group_size: int = Field(32, ge=2)
    embeddings: bool = True
    max_steps: int = Field(200, ge=1)
    lr_factor: float = Field(0.1, gt=0, le=10)

    def check(self, strength: int, model: ModelConfig) -> None:
        """Bits: 8, 6, 4, 3 or 2; groups must divide the inputs of every matrix that has more."""
        if strength not in (8, 6, 4, 3, 2):
            raise ConfigError(f"recipes: lsq{strength}: bits must be one of 8, 6, 4, 3, 2")
        if self.granularity == "group":
            check_groups("lsq", self.group_size, model)
