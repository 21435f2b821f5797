"""Cells are composed quickly, and as Hydra composes them."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest

from train_then_compress import run, sweep

SWEEP = [
    "-m", "+scale=cpu", "model.depth=1,2", "budget=steps,tokens", "budget.value=5000", "recipes=[none,quant4]",
    "++data.fraction=0.5,1",
]  # fmt: skip


def test_cells_are_those_that_hydra_composes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = sweep.compose(SWEEP)
    monkeypatch.setattr(sweep, "_alike_from_one_composition", nullcontext)
    assert quick == sweep.compose(SWEEP)
    assert len(quick[0]) == 2**3 and not quick[1]


def test_a_sweep_in_an_experiment_is_composed_once_for_all_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []
    original = sweep.ConfigLoaderImpl.load_sweep_config

    def counted(*arguments: object) -> object:
        composed.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(sweep.ConfigLoaderImpl, "load_sweep_config", counted)
    configs, errors = sweep.compose(["experiment=demo", "seed=0,1,2"])
    assert len(configs) == 12 and not errors and len(composed) == 1


def test_a_key_that_is_not_there_ends_in_hydras_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.compose(["-m", "model.dept=1,2"])
    assert "Could not override 'model.dept'" in capsys.readouterr().err


def test_the_process_that_got_ready_ends_with_a_command_that_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = sweep._start

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(sweep, "_start", noted)
    assert sweep.run(["model.depth=99"]) == 2
    (process,) = started
    assert process.returncode is not None


def test_a_runs_process_that_is_told_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep was stopped while Hydra composed."""
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run.main() == 0
