"""The growth benchmark at its smallest, and its exponents."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("growth")


def test_every_line_has_its_points_and_exponents(
    benchmark: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--not-alone", "--threads", "1", "--dtype", "fp32", "--text", str(text)]
    record = benchmark.main([*argv, "--cache", str(tmp_path)])
    lines = record["growth_of"]
    assert {grown: [point[grown] for point in line["points"]] for grown, line in lines.items()} == {
        "depth": [1, 2], "width": [16, 32], "length": [16, 32], "batch": [2, 4],
        "processes": [1, 2],
    }  # fmt: skip
    # Twice the sequences cost twice the FLOPs, twice the width between twice and four times, two processes what one.
    assert lines["batch"]["expected"] == pytest.approx(1, abs=0.1) and 1 < lines["width"]["expected"] < 2
    assert 0 < lines["depth"]["expected"] < 1 and lines["processes"]["expected"] == pytest.approx(0, abs=0.01)
    assert all(point["seconds"]["median"] > 0 for line in lines.values() for point in line["points"])
    assert "| width | " in capsys.readouterr().out
