"""`ttc run` disturbed: killed, told to stop, diverging, met by another process, and in two processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_then_compress.records import RunDirectory, read_json, read_rows

Command = Callable[..., subprocess.CompletedProcess[str]]
Compare = Callable[[Path, Path], None]
RunHere = Callable[..., list[Path]]
KillAt = Callable[[Path, list[str], str, int], None]
TTC = [str(Path(sys.executable).with_name("ttc"))]


def runs_of(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("dtype", "budget", "moments"),
    [("fp32", 400, [("pretrain", 6), ("prune99", 7)]), ("bf16", 120, [("pretrain", 70)])],
)
def test_killed_at_several_moments_it_ends_in_the_same_weights(
    tmp_path: Path, common: list[str], ttc: Command, run_here: RunHere, assert_same_weights: Compare, kill_at: KillAt,
    dtype: str, budget: int, moments: list[tuple[str, int]],
) -> None:  # fmt: skip
    """SIGKILL in training and in recovery, with dropout; then the same command. In 400 steps so much is learned, and by
    the pruning so much lost, that there is something to recover; in 60 steps of it the kill finds it going on."""
    arguments = [
        "run", *common, "recipes=[prune99]", "steps.prune.increment=99", "steps.prune.recovery.max_steps=60",
        "steps.prune.recovery.check_every=60", f"budget.value={budget}", "optimizer.lr=1e-2", "model.dropout=0.1",
        f"runtime.dtype={dtype}",
    ]  # fmt: skip
    (calm,) = run_here(*arguments[1:], "study=calm", cwd=tmp_path)
    for stage, step in moments:
        kill_at(tmp_path, [*arguments, "study=killed"], stage, step)
    finished = ttc(*arguments, "study=killed", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    (killed,) = runs_of(tmp_path / "runs/killed")
    assert_same_weights(calm, killed)
    rows = [(row["stage"], row["split"], row["steps"]) for row in read_rows(killed / "metrics.jsonl")]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_stops_the_sweep(
    tmp_path: Path, common: list[str], number: signal.Signals
) -> None:
    """Sent to ``ttc`` alone, which has no terminal."""
    arguments = ["run", "-m", *common, "study=stopped", "seed=0,1", "budget.value=100000"]
    process = subprocess.Popen(
        [*TTC, *arguments], cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("runs/stopped/*/checkpoint/*/step-*")):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "its checkpoint is written" in errors
    assert len(runs_of(tmp_path / "runs/stopped")) == 1


def test_a_run_that_diverges_is_recorded_and_the_sweep_goes_on(tmp_path: Path, common: list[str], ttc: Command) -> None:
    done = ttc("run", "-m", *common, "study=bad", "optimizer.weight_decay=1e30,0.01", cwd=tmp_path)
    assert done.returncode == 1
    assert "not done" in done.stderr and "not finite at step" in done.stderr
    failed, finished = sorted(runs_of(tmp_path / "runs/bad"), key=lambda run: (run / "result.json").exists())
    assert "not finite" in read_json(failed / "failure.json")["reason"]
    assert (finished / "result.json").exists() and not (finished / "failure.json").exists()


def test_a_second_process_on_the_same_run_refuses_in_words(
    tmp_path: Path, common: list[str], ttc: Command, run_here: RunHere
) -> None:
    (run,) = run_here(*common, "study=one", "budget.value=2", cwd=tmp_path)
    (run / "result.json").unlink()
    with RunDirectory(run).locked():
        refused = ttc("run", *common, "study=one", "budget.value=2", cwd=tmp_path)
    assert refused.returncode == 1 and "is being worked on by another process" in refused.stderr


def test_two_processes_train_as_one(tmp_path: Path, common: list[str], ttc: Command, run_here: RunHere) -> None:
    """Data parallelism changes the order of additions only."""
    arguments = [*common, "budget.value=4", "optimizer.warmup=0", "recipes=[none]"]
    run_here(*arguments, "study=alone", cwd=tmp_path)
    both = ttc("run", *arguments, "study=both", "runtime.processes=2", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    (alone,), (together,) = (list(tmp_path.glob(f"runs/{s}/*/stages/*/model.safetensors")) for s in ("alone", "both"))
    expected, weights = load_file(alone), load_file(together)
    for name in expected:
        assert torch.allclose(expected[name], weights[name], atol=1e-5), name
