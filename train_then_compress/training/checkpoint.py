"""Checkpoints: weights, optimizer and clock, written whole or not at all, and checked when they are read.

<directory>/step-000000120/{model.safetensors, optimizer.safetensors, state.json}; a milestone's directory ends with
``-at-<milestone>``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from train_then_compress.config import Milestone
from train_then_compress.records import Damaged
from train_then_compress.training.clock import Clock

log = logging.getLogger(__name__)
_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a training: ``model`` and ``optimizer`` by tensor name, and the clock."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    clock: Clock
    milestone: Milestone | None = None


class Checkpoints:
    """The checkpoints of one stage: the last two and every milestone."""

    def __init__(self, directory: Path, every_seconds: float):
        self.directory, self.every_seconds = directory, every_seconds
        self._written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() - self._written >= self.every_seconds

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint under a temporary name, flush it to the disk, rename it, and drop the oldest.

        Raises `CheckpointError` where it cannot be written (a full disk); the earlier ones stay.
        """
        milestone = "" if snapshot.milestone is None else f"-at-{snapshot.milestone}"
        final = self.directory / f"step-{snapshot.clock.steps:09d}{milestone}"
        temporary = self.directory / f".writing-{snapshot.clock.steps}-{os.getpid()}"
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            sums = {
                name: _write(temporary / name, save({k: v.contiguous() for k, v in tensors.items()}))
                for name, tensors in
                (("model.safetensors", snapshot.model), ("optimizer.safetensors", snapshot.optimizer))
            }  # fmt: skip
            state = {"clock": snapshot.clock.facts(), "milestone": snapshot.milestone, "sha256": sums}
            _write(temporary / "state.json", json.dumps(state).encode())
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _flush_directory(self.directory)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint {final} could not be written ({error.strerror}); free some disk space and give the "
                "same command again: training goes on from the checkpoint before it"
            ) from error
        self._written = time.monotonic()
        self._drop_old()

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; torn or altered ones are reported and passed over."""
        paths = sorted(self.directory.glob("step-*"), reverse=True)
        for path in paths:
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s; passed over", error)
        if paths:
            log.warning("%s holds no whole checkpoint: training begins again", self.directory)
        return None

    def has(self, milestone: Milestone) -> bool:
        """Whether a milestone was kept."""
        return any(_milestone(path) == milestone for path in self.directory.glob("step-*"))

    def finish(self) -> None:
        """Keep the milestones only: the stage is done and its weights stand in its record's directory."""
        for path in self.directory.glob("step-*"):
            if _milestone(path) is None:
                shutil.rmtree(path)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _drop_old(self) -> None:
        plain = [path for path in sorted(self.directory.glob("step-*")) if _milestone(path) is None]
        for path in plain[:-_KEPT]:
            shutil.rmtree(path)
        for path in self.directory.glob(".writing-*"):
            shutil.rmtree(path)


def perplexity_milestone(perplexity: float) -> Milestone:
    """The name of a milestone kept for its perplexity."""
    return f"perplexity{perplexity:g}"


def milestone_path(directory: Path, milestone: Milestone) -> Path:
    """The checkpoint kept as a milestone; raises `CheckpointError` naming those that were kept."""
    kept = {_milestone(path): path for path in sorted(directory.glob("step-*"))}
    if milestone not in kept:
        there = ", ".join(str(value) for value in kept if value is not None) or "none"
        raise CheckpointError(f"no milestone {milestone} in {directory} (there: {there}); see checkpoint.keep_at")
    return kept[milestone]


def read_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint and check its sums; raises `CheckpointError` for a torn or altered one."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name, expected in state["sha256"].items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise CheckpointError(f"{path / name} is torn or was altered (its checksum differs)")
        model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error})") from error
    return Snapshot(model, optimizer, Clock(**state["clock"]), state["milestone"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a finished stage; raises `Damaged`."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Damaged(path, error) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named ``<parameter number>.<name>``."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, values in state.items() for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _milestone(path: Path) -> Milestone | None:
    try:
        value: Milestone | None = json.loads((path / "state.json").read_text())["milestone"]
    except (OSError, ValueError, KeyError):
        return None
    return value


def _write(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
