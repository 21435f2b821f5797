"""The masked-LM benchmark at its smallest: what it measures is written down; how fast is not looked at."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")
WORDS = ("a machine", "the model", "some text", "every batch", "its clock", "one round")
VERBS = ("measures", "repeats", "forgets", "compares", "holds")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "masked_lm_training.py"
    spec = importlib.util.spec_from_file_location("masked_lm_training", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred short documents, no two alike."""
    blocks = [
        f"Number {number}: {WORDS[number % 6]} {VERBS[number % 5]} {WORDS[number % 4]}. It took {number * 7} steps."
        for number in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(blocks))
    return path


def run(benchmark: ModuleType, text: Path, folder: Path, *options: str) -> dict[str, Any]:
    """The benchmark's record at depth 1 and width 32."""
    small = ["--depth", "1", "--width", "32", "--head-size", "16", "--rounds", "1", "--steps", "1"]
    small += ["--batch-size", "2", "--length", "16", "--vocab-size", "300", "--threads", str(torch.get_num_threads())]
    places = ["--text", str(text), "--cache", str(folder / "cache"), "--json", str(folder / "out.json")]
    record: dict[str, Any] = benchmark.main([*small, *places, "--not-alone", *options])
    return record


def test_the_record_says_what_was_measured(
    benchmark: ModuleType,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark, "_CALIBRATION_SECONDS", 0.02)
    record = run(benchmark, text, tmp_path, "--dtype", "fp32")
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert list(record["models"]) == ["train_then_compress", "fairseq"]
    ours, theirs = record["models"].values()
    assert theirs["encoder_parameters"] == ours["encoder_parameters"] + 2 * 32
    for facts in (ours, theirs):
        assert facts["tokens_per_second"]["median"] > 0 and 0 < facts["share_of_peak"]["median"] < 1
        assert len(facts["seconds_by_round"]) == 1 and len(facts["seconds_by_round"][0]) == 1
    (ratio,) = record["ratio"]["by_round"]
    assert ratio == pytest.approx(ours["tokens_per_second"]["median"] / theirs["tokens_per_second"]["median"])
    assert record["settings"]["dtype"] == "fp32" and record["settings"]["heads"] == 2
    assert record["machine"]["threads"] == torch.get_num_threads() and not record["machine"]["alone"]
    assert {"torch", "python", "train-then-compress"} < record["versions"].keys()
    assert record["calibration"]["before"].keys() == record["calibration"]["after"].keys() == {"fp32", "bf16"}
    printed = capsys.readouterr().out
    for expected in (
        "| train_then_compress |",
        "| fairseq |",
        "1x32, 2 heads",
        "64 parameters more",
        record["command"],
    ):
        assert expected in printed


def test_rotary_positions_stand_beside_fairseqs_learned_ones(
    benchmark: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_CALIBRATION_SECONDS", 0.02)
    settings = run(benchmark, text, tmp_path, "--positions", "rotary", "--dtype", "bf16", "--dropout", "0.1")[
        "settings"
    ]
    assert (settings["positions"], settings["fairseq_positions"]) == ("rotary", "learned")


def test_the_first_of_a_round_alternates(benchmark: ModuleType) -> None:
    order: list[str] = []

    class Taker:
        def __init__(self, name: str) -> None:
            self.name = name

        def rehearse(self, steps: int) -> None:
            order.append(f"{self.name} rehearses {steps}")

        def take_round(self, steps: int) -> None:
            order.append(self.name)

    benchmark.take_turns([Taker("ours"), Taker("theirs")], rounds=3, steps=2)
    assert order == ["ours rehearses 6", "theirs rehearses 6", "ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_the_recorded_command_names_no_place_of_this_machine(benchmark: ModuleType) -> None:
    given = ["--depth", "2", "--cache", "/somewhere/cache", "--json=/somewhere/out.json", "--norm", "post"]
    assert benchmark.command(given) == "python benchmarks/masked_lm_training.py --depth 2 --norm post"


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--json", "nowhere/at/all.json"], ["--positions", "none"]])
def test_wrong_options_end_early(benchmark: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
