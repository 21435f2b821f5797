"""Time to quality: both parties meet in one evaluation, and what is read off their budgets."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("fairseq")


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("time_to_quality")


@pytest.mark.parametrize(("loss", "seconds"), [(6.0, 10.0), (5.0, 10.0), (4.5, 20.0), (4.0, 40.0), (3.9, None)])
def test_the_time_to_a_loss_lies_between_the_budgets(benchmark: ModuleType, loss: float, seconds: float | None) -> None:
    runs = [{"seconds": 40.0, "loss": 4.0}, {"seconds": 10.0, "loss": 5.0}]
    assert benchmark.time_to(loss, runs) == (seconds if seconds is None else pytest.approx(seconds))


def test_no_program_outlives_the_benchmark(benchmark: ModuleType) -> None:
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(SystemExit), benchmark._ended(program):
        raise SystemExit(128 + signal.SIGTERM)
    assert program.poll() == -signal.SIGTERM


def test_fairseq_is_trained_and_judged_by_our_evaluation(
    benchmark: ModuleType,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "updates_per_second", lambda config, data, seconds: 4.0)
    monkeypatch.setattr(benchmark, "ours", lambda arguments, seconds: {
        "budget": seconds, "seconds": seconds, "updates": 9, "loss": 3.0,
    })  # fmt: skip
    argv = ["--quick", "--not-alone", "--threads", "1", "--seconds", "1", "--text", str(text)]
    record = benchmark.main([*argv, "--cache", str(tmp_path)])
    _, (theirs,) = record["runs"].values()
    assert list(record["runs"]) == ["train_then_compress", "fairseq-train, rate 0.0005"]
    # Nothing has been learned in four updates: about the logarithm of the vocabulary.
    assert theirs["updates"] == 4 and theirs["seconds"] > 0 and 4 < theirs["loss"] < 8
    assert record["loss"] == theirs["loss"] and list(record["time_to"].values()) == [1.0, theirs["seconds"]]
    assert "seconds to a loss of" in capsys.readouterr().out
