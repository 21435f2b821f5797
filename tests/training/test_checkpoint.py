"""Checkpoints: whole or not at all, checked when read, the last two and the milestones kept."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from train_then_compress.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Snapshot,
    milestone_path,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
)
from train_then_compress.training.clock import Clock


def snapshot(steps: int, milestone: float | None = None) -> Snapshot:
    model = {"weight": torch.full((3, 2), float(steps))}
    return Snapshot(model, {"0.step": torch.tensor(float(steps))}, Clock(0.1 * steps, 5.0, 7, steps), milestone)


def test_last_two_and_milestones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 0)
    for steps in (1, 2, 3, 4, 5):
        checkpoints.save(snapshot(steps, 0.5 if steps == 2 else None))
    kept = ["step-000000002-at-0.5", "step-000000004", "step-000000005"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    latest = checkpoints.latest()
    assert latest is not None and latest.clock == Clock(0.5, 5.0, 7, 5) and latest.model["weight"][0, 0] == 5
    checkpoints.finish()
    assert read_checkpoint(milestone_path(tmp_path, 0.5)).clock.steps == 2
    assert [path.name for path in tmp_path.iterdir()] == kept[:1]
    with pytest.raises(CheckpointError, match=r"0\.25.*there: 0\.5.*checkpoint\.keep_at"):
        milestone_path(tmp_path, 0.25)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["torn", "altered", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save(snapshot(1))
    checkpoints.save(snapshot(2))
    path = tmp_path / "step-000000002" / name
    content = path.read_bytes()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        latest = checkpoints.latest()
    assert latest is not None and latest.clock.steps == 1
    assert "step-000000002" in caplog.text and "passed over" in caplog.text


def test_a_full_disk_is_said_in_words_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save(snapshot(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some disk space"):
        checkpoints.save(snapshot(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    latest = checkpoints.latest()
    assert latest is not None and latest.clock.steps == 1


def test_optimizer_state_survives_the_round_trip() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2, fused=True) for model in (first, second)]
    x = torch.randn(4, 3)
    for _ in range(3):
        first(x).square().sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    second.load_state_dict(first.state_dict())
    restore_optimizer(optimizers[1], {k: v.clone() for k, v in optimizer_tensors(optimizers[0]).items()})
    for model, optimizer in zip((first, second), optimizers, strict=True):
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
