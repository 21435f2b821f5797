"""The training loop against plain PyTorch, and what it promises about budgets, resumes and bad losses."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from train_then_compress.config import BudgetConfig, Config, ConfigError
from train_then_compress.data.prepare import Prepared
from train_then_compress.records import read_rows
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.progress import StageProgress
from train_then_compress.training import interrupt
from train_then_compress.training.checkpoint import Checkpoints
from train_then_compress.training.loop import Desk, Diverged, Fitted, Training, fit
from train_then_compress.training.schedule import constant, evaluation_points, schedule

BuildConfig = Callable[..., Config]


def training_of(config: Config, **changes: Any) -> Training:
    return Training(
        **{
            "budget": config.budget, "optimizer": config.optimizer, "rate": schedule(config.optimizer),
            "evaluate_at": evaluation_points(config.evaluation), "seed": config.seed, **changes,
        }
    )  # fmt: skip


def train(
    config: Config, prepared: Prepared, directory: Path, every_seconds: float = 1e9, **changes: Any
) -> tuple[torch.nn.Module, Fitted]:
    task = MaskedLMTask(config, prepared, config.seed)
    model = task.new_model()
    metrics = MetricsLog(directory / "metrics.jsonl")
    checkpoints = Checkpoints(directory / "checkpoint", every_seconds)
    with StageProgress("pretrain") as display:
        desk = Desk("pretrain-test", config.runtime, checkpoints, metrics, display)
        return model, fit(model, task, training_of(config, **changes), desk)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_steps_are_those_of_plain_pytorch(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    """Whole batch, mean loss, clip_grad_norm_, AdamW: written out as a textbook would."""
    config = build_config(budget={"kind": "steps", "value": 4}, optimizer={"batch_size": 8, "warmup": 0, "clip": 0.5})
    fitted, _ = train(config, prepared, tmp_path, rate=constant(1e-2))
    task = MaskedLMTask(config, prepared, config.seed)
    model = task.new_model()
    o = config.optimizer
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-2, (o.beta1, o.beta2), o.eps)
    for step in range(4):
        batch = task.batch(step)
        tokens, masked = torch.from_numpy(batch.tokens), torch.from_numpy(batch.masked)
        logits = model(tokens, masked.flatten().nonzero().squeeze(1))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
    for name, parameter in fitted.named_parameters():
        assert torch.allclose(parameter, dict(model.named_parameters())[name], atol=2e-5), name


@pytest.mark.parametrize("kind,value", [("seconds", 0.6), ("flops", 2e8), ("tokens", 3000), ("steps", 9)])
def test_training_ends_with_the_budget(
    build_config: BuildConfig, prepared: Prepared, tmp_path: Path, kind: str, value: float
) -> None:
    config = build_config(budget={"kind": kind, "value": value})
    _, fitted = train(config, prepared, tmp_path)
    spent = getattr(fitted.clock, kind)
    assert spent >= value and (kind != "steps" or spent == value)
    assert spent - value <= 2 * spent / fitted.clock.steps or kind == "seconds"
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert {"seconds", "flops", "tokens", "steps", "lr", "tokens_per_second", "progress"} <= set(rows[0])
    assert sum(row["split"] == "validation" for row in rows) >= 1 and rows[-1]["progress"] >= 1


def test_micro_batches_change_nothing_but_rounding(
    build_config: BuildConfig, prepared: Prepared, tmp_path: Path
) -> None:
    config = build_config(budget={"kind": "steps", "value": 3}, optimizer={"batch_size": 8})
    whole, _ = train(config, prepared, tmp_path / "whole")
    pieces = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, micro_batch=2))
    split, _ = train(pieces, prepared, tmp_path / "split")
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_stopped_training_goes_on_to_the_same_weights(
    build_config: BuildConfig, prepared: Prepared, tmp_path: Path, dtype: str
) -> None:
    """SIGTERM at a step; dropout on; the resumed weights are equal bit for bit, and no metric row stands twice."""
    config = build_config(
        budget={"kind": "steps", "value": 12}, runtime={"dtype": dtype, "threads": 1}, model={"dropout": 0.1}
    )
    undisturbed, _ = train(config, prepared, tmp_path / "undisturbed")

    def stop_at_some_step(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        interrupt.listen()
        with pytest.raises(interrupt.Interrupted, match="step 7"):
            train(config, prepared, tmp_path / "stopped", after_step=stop_at_some_step)
        interrupt.listen()
        resumed, fitted = train(config, prepared, tmp_path / "stopped")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert same(undisturbed, resumed) and fitted.clock.steps == 12
    rows = [(row["split"], row["steps"]) for row in read_rows(tmp_path / "stopped" / "metrics.jsonl")]
    assert len(rows) == len(set(rows))


def test_after_each_step_its_number_is_told(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    """Not after those of warming up."""
    told: list[int] = []
    config = build_config(budget={"kind": "steps", "value": 4}, optimizer={"warmup": 0})
    train(config, prepared, tmp_path, after_step=told.append)
    assert told == [1, 2, 3, 4]


def test_warming_up_leaves_no_trace(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    config = build_config(budget={"kind": "steps", "value": 1}, optimizer={"warmup": 0})
    still, _ = train(config, prepared, tmp_path, rate=constant(0.0), optimizer=config.optimizer)
    assert same(still, MaskedLMTask(config, prepared, config.seed).new_model())


def test_a_loss_that_is_not_finite_stops_with_the_step(
    build_config: BuildConfig, prepared: Prepared, tmp_path: Path
) -> None:
    config = build_config(optimizer={"weight_decay": 1e30})
    with pytest.raises(Diverged, match="pretrain-test: loss or gradient is not finite at step 1"):
        train(config, prepared, tmp_path, rate=constant(1e-2))


def test_a_budget_below_a_step_is_refused(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    config = build_config(budget={"kind": "tokens", "value": 10})
    with pytest.raises(ConfigError, match=r"budget\.value=10.*one step costs.*warm-up"):
        train(config, prepared, tmp_path)


def test_stop_ends_early_at_an_evaluation(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    config = build_config()
    budget = BudgetConfig(kind="steps", value=10)
    _, fitted = train(config, prepared, tmp_path, budget=budget, evaluate_at=[0.4, 0.8], stop=lambda quality: True)
    assert fitted.clock.steps == 4


def test_a_step_that_passes_two_milestones_keeps_both(
    build_config: BuildConfig, prepared: Prepared, tmp_path: Path
) -> None:
    train(build_config(budget={"kind": "steps", "value": 4}), prepared, tmp_path, keep_at=[0.3, 0.45])
    kept = {path.name for path in (tmp_path / "checkpoint").glob("*-at-*")}
    assert kept == {"step-000000002-at-0.3", "step-000000002-at-0.45"}


def test_milestones_and_branches(build_config: BuildConfig, prepared: Prepared, tmp_path: Path) -> None:
    """A cooldown branched from a milestone equals a run with the smaller budget from the start (same warm-up steps)."""
    wsd = {"schedule": "wsd", "cooldown": 0.25, "warmup": 0.0}
    long = build_config(budget={"kind": "steps", "value": 16}, optimizer=wsd)
    train(long, prepared, tmp_path / "long", keep_at=[0.25])
    short = build_config(budget={"kind": "steps", "value": 8}, optimizer=wsd)
    direct, _ = train(short, prepared, tmp_path / "direct")
    milestone = next((tmp_path / "long" / "checkpoint").glob("step-000000004-at-0.25"))
    from train_then_compress.training.checkpoint import read_checkpoint

    branched, fitted = train(short, prepared, tmp_path / "branch", start=read_checkpoint(milestone))
    assert same(direct, branched) and fitted.clock.steps == 8
