"""Cells are composed quickly, and as Hydra composes them."""

from __future__ import annotations

import io
import os
import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators ignore the variables")
def test_a_runs_process_keeps_the_memory_it_frees() -> None:
    """64 MB again and again: 16,384 pages, which the kernel clears when they are touched for the first time."""
    code = """
import resource
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    kept = {name: value for name, value in sweep.environment(1).items() if name in plain or "MALLOC_" in name}
    faults = [
        [int(line) for line in subprocess.check_output([sys.executable, "-c", code], env=env).splitlines()]
        for env in (plain, kept)
    ]
    assert min(faults[0]) > 1000 and faults[1][0] > 1000 and max(faults[1][1:]) < 100
