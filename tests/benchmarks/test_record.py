"""What every benchmark's record and options have in common."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from train_then_compress.cost import machine
from train_then_compress.records import Busy


@pytest.fixture(scope="module")
def record(benchmarks: Path) -> ModuleType:
    return importlib.import_module("common.record")


def conduct(record: ModuleType, *argv: str) -> dict[str, Any]:
    arguments = record.parse(record.options("what"), argv, {}, ())

    def measure(given: Any, calibration: dict[str, float]) -> dict[str, Any]:
        assert given is arguments and calibration["fp32"] > 0
        return {"answer": 42}

    found: dict[str, Any] = record.conduct("/there/some.py", argv, arguments, {}, measure, lambda r: f"{r['answer']}")
    return found


def test_what_is_measured_stands_with_its_conditions(
    record: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some.json"
    found = conduct(record, "--quick", "--threads", "1", "--not-alone", "--cache", "/somewhere", f"--json={out}")
    assert json.loads(out.read_text()) == found and out.with_suffix(".md").read_text() == capsys.readouterr().out
    assert (found["benchmark"], found["answer"]) == ("some", 42)
    assert found["command"] == "python benchmarks/some.py --quick --threads 1 --not-alone"
    assert found["settings"] == {"quick": True, "threads": 1} and found["machine"]["threads"] == 1
    assert {"torch", "python", "train-then-compress"} < found["versions"].keys()
    fastest = record.peaks(found)["fp32"]
    assert fastest == max(found["calibration"][when]["fp32"] for when in ("before", "after")) > 0
    text = out.with_suffix(".md").read_text()
    assert text.startswith("42\n\n") and "run beside others" in text and f"`{found['command']}`" in text


def test_the_machine_is_held_meanwhile(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    with machine.held("cpu", exclusive=False), pytest.raises(Busy):
        conduct(record, "--quick")


def test_quartiles(record: ModuleType) -> None:
    assert record.quartiles([1, 2, 3, 4, 5]) == {"median": 3, "q25": 2, "q75": 4}
    assert record.spread({"median": 3000, "q25": 2000, "q75": 4000}) == "3,000 (2,000 - 4,000)"


def test_the_exponent_of_a_power_is_found(record: ModuleType) -> None:
    values = [1, 2, 4, 8]
    assert record.exponent(values, [3 * value**1.5 for value in values]) == pytest.approx(1.5)


def test_wrong_options_end_early(record: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, needs, said in (
        (["--json", "nowhere/at/all.json"], (), "no directory nowhere/at"),
        ([], ("no_such_package",), "no_such_package is not installed"),
    ):
        with pytest.raises(SystemExit):
            record.parse(record.options("what"), argv, {}, needs)
        assert said in capsys.readouterr().err
