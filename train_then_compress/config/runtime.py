"""``conf/runtime``, ``conf/tracker`` and ``paths``: how fast, who watches, where files go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train_then_compress.config.base import config_dataclass, reject


@config_dataclass
class RuntimeConfig:
    """How fast a run is computed.

    ``dtype=auto`` means bf16 autocast where the CPU has AVX512-BF16 or AMX (or on a GPU), else fp32.
    ``threads=0`` takes every core the process may use, shared among its ``processes``.
    ``micro_batch`` is the number of sequences in one forward pass (0: all of a rank's share).
    """

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    threads: int = Field(0, ge=0)
    processes: int = Field(1, ge=1)
    micro_batch: int = Field(0, ge=0)


@config_dataclass
class TrackerConfig:
    """Weights & Biases, or nothing. ``metrics.jsonl`` is always written."""

    name: Literal["none", "wandb"] = "none"
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "train_then_compress"
    entity: str | None = None


@config_dataclass
class PathsConfig:
    """Where studies and prepared corpora are kept; relative paths are relative to the working directory."""

    runs: str = "runs"
    cache: str = "cache"

    @model_validator(mode="after")
    def _not_empty(self) -> PathsConfig:
        for key in ("runs", "cache"):
            if not getattr(self, key):
                raise reject(f"paths.{key}", "''", "a directory is needed")
        return self
