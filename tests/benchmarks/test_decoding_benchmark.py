"""The decoding benchmark at its smallest: both find the same, and what it measures is written down."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from train_then_compress.config import ConfigError

pytest.importorskip("fairseq")
QUICK = ["--quick", "--not-alone", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("decoding")


@pytest.fixture(scope="module")
def sinusoidal_run(translator_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run under other positions, which have no weights either: fairseq knows no rotary ones."""
    run = tmp_path_factory.mktemp("sinusoidal") / "run"
    shutil.copytree(translator_run, run)
    said = yaml.safe_load((run / "config.yaml").read_text())
    said["model"]["positions"] = "sinusoidal"
    (run / "config.yaml").write_text(yaml.safe_dump(said))
    return run


def test_both_find_the_same_and_speeds_are_recorded(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = benchmark.main([*QUICK, "--json", str(tmp_path / "out.json")])
    assert [(one["beam"], one["batch_size"]) for one in record["beside_fairseq"]] == [(1, 1), (1, 2), (5, 1), (5, 2)]
    for measured in record["beside_fairseq"]:
        same = measured["agreement"]
        assert same["sentences"] == same["of"] == measured["sentences"] and same["largest_score_difference"] < 1e-4
        ours, theirs = (facts["sentences_per_second"]["median"] for facts in measured["parties"].values())
        assert measured["ratio"]["median"] == pytest.approx(ours / theirs)
    for measured in record["by_length"]:
        assert measured["lengths"] == [4, 8]
        assert all(len(facts["seconds_per_token"]) == 2 for facts in measured["parties"].values())
    printed = capsys.readouterr().out
    assert "| beam | batch | party |" in printed and "2 of 2, scores within" in printed
    assert (tmp_path / "out.json").is_file() and (tmp_path / "out.md").read_text() in printed


def test_a_draft_is_measured_beside_plain_greedy_decoding(
    benchmark: ModuleType, sinusoidal_run: Path, tmp_path: Path
) -> None:
    options = ["--point", str(sinusoidal_run), "--draft", f"{sinusoidal_run}:quant4", "--cache", str(tmp_path)]
    record = benchmark.main([*QUICK, *options])
    assert record["sources"] == "run:none on test sentences of parallel_files"
    assert "--point" not in record["command"] and str(sinusoidal_run) not in str(record)
    for measured in record["speculative"]:
        plain, drafted = measured["parties"].values()
        assert drafted["agreement"]["sentences"] == drafted["agreement"]["of"] == measured["sentences"]
        assert 0 <= drafted["acceptance"] <= 1 and drafted["draft_length"] == 2
        assert drafted["ratio"]["median"] == pytest.approx(plain["seconds"][0] / drafted["seconds"][0])


def test_the_exponent_of_a_power_law(benchmark: ModuleType) -> None:
    lengths = [16, 32, 64]
    assert benchmark.common.exponent(lengths, [2e-3 * length**0.7 for length in lengths]) == pytest.approx(0.7)


def test_points_that_cannot_be_measured_end_early(
    benchmark: ModuleType, translator_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="nowhere: no run there"):
        benchmark.main([*QUICK, "--point", "nowhere"])
    with pytest.raises(ConfigError, match="fairseq has learned and sinusoidal positions only"):
        benchmark.main([*QUICK, "--point", str(translator_run)])
    with pytest.raises(SystemExit):
        benchmark.main([*QUICK, "--rounds", "0"])
