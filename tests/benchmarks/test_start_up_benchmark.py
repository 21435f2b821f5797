"""The start-up benchmark on a few made-up runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from train_then_compress.analysis.table import load_study


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("start_up")


def sweep_of(text: Path, tmp_path: Path) -> list[str]:
    return ["-m", "study=finished", "+scale=cpu", "data=text_files", f"data.train={text}", "model.depth=1,2",
            "budget.value=60", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]  # fmt: skip


def test_made_up_runs_are_finished_and_can_be_read(benchmark: ModuleType, text: Path, tmp_path: Path) -> None:
    given = [*sweep_of(text, tmp_path), "recipes=[none,quant4]"]
    benchmark.fabricate(given)
    configs, _ = benchmark.sweep.compose(given)
    assert [benchmark.locate(config).done for config in configs] == [True, True]
    study = load_study(tmp_path / "runs" / "finished")
    assert not study.missing and sorted(study.points["recipe"]) == ["none", "none", "quant4", "quant4", "unigram"]
    assert study.points["frontier"].sum() >= 1 and len(study.metrics) == 2 * 113


def test_everything_is_timed(
    benchmark: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--depths", "1", "--widths", "64", "--seeds", "2"]
    argv = ["--quick", "--not-alone", "--threads", "1", "--text", str(text), "--cache", str(tmp_path / "cache"), *few]
    record = benchmark.main(argv)
    assert (record["runs"], record["points"]) == (2, 10) and len(record["seconds"]) == 5
    assert all(facts["median"] > 0.01 and len(facts["by_round"]) == 1 for facts in record["seconds"].values())
    assert "| ttc run, 2 finished runs |" in capsys.readouterr().out


def test_a_command_that_fails_is_no_measurement(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(benchmark.Unmeasured, match=r"(?s)ttc table nowhere failed.*neither"):
        benchmark.ended("table", "nowhere")
