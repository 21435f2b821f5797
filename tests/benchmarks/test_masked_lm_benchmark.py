"""The masked-LM benchmark at its smallest: every party trains, and what is measured is written down."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from train_then_compress.config import BudgetConfig
from train_then_compress.data.fairseq_export import export_fairseq
from train_then_compress.data.prepare import prepare

pytest.importorskip("fairseq")
NAMES = ["train_then_compress", "fairseq-train", "fairseq's model in our loop", "transformers Trainer"]


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("masked_lm_training")


@pytest.fixture
def quick(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.getbasetemp() / "masked_lm_cache"
    return ["--quick", "--text", str(text), "--cache", str(cache), "--vocab-size", "300", "--threads", "1",
            "--dtype", "fp32", "--not-alone"]  # fmt: skip


@pytest.mark.parametrize("party", ["ours", "fairseq_model", "transformers"])
def test_every_party_trains(
    benchmark: ModuleType, quick: list[str], one_interval: Callable[..., int], party: str
) -> None:
    config = benchmark.config_of(benchmark.parse(quick), "1x32")
    tokens = one_interval(importlib.import_module("parties.masked_lm").PARTIES[party], config, 3)
    # Three batches of two sequences, which are at most 16 tokens long and not much shorter.
    assert 3 * 2 * 8 < tokens <= 3 * 2 * 16 + (2 * 16 if party == "transformers" else 0)  # it makes a batch ahead


def test_fairseq_train_takes_its_command(
    benchmark: ModuleType, quick: list[str], fairseq_interval: Callable[..., float], tmp_path: Path
) -> None:
    config = benchmark.config_of(benchmark.parse(quick), "1x32")
    config = dataclasses.replace(config, budget=BudgetConfig(kind="steps", value=4))
    export_fairseq(prepare(config.data, Path(config.paths.cache)), tmp_path / "data")
    _, party, *_ = benchmark.parties(config, 3, tmp_path / "data")
    assert 3 * 2 * 8 < fairseq_interval(party.command, party.read) <= 3 * 2 * 16


@pytest.mark.usefixtures("made_up_turns")
def test_the_record_compares_all_parties(
    benchmark: ModuleType, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmark.main(quick)
    (measured,) = record["shapes"].values()
    assert list(measured["parties"]) == NAMES and list(measured["ratio"]) == NAMES[1:]
    assert [facts["tokens_per_second"]["median"] for facts in measured["parties"].values()] == [200, 100, 100, 100]
    assert [ratio["by_round"] for ratio in measured["ratio"].values()] == [[2.0]] * 3
    # 1x32, 16 tokens: 12 width^2 weights and 2 length * width of attention in the layer, 2 FLOPs each, 3 passes; about
    # 15 % of the positions are predicted; padding is computed and not counted.
    positions = 3 * 2 * (12 * 32**2 + 2 * 16 * 32 + 0.15 * (32**2 + 300 * 32))
    assert 0.9 * positions < measured["flops_per_token"] < 1.5 * positions
    printed = capsys.readouterr().out
    share = measured["parties"][NAMES[0]]["share_of_peak"]["fp32"]["median"]
    assert share == pytest.approx(200 * measured["flops_per_token"] / measured["peaks"][0]["fp32"])
    assert f"| 1x32 | {NAMES[0]} | 200 (200 - 200) | {share:.0%} |" in printed
    assert f"| 1x32 | {NAMES[3]} | 100 (100 - 100) |" in printed and "| 2.00 (2.00 - 2.00) |" in printed


def test_each_party_is_a_command_of_its_own(benchmark: ModuleType, quick: list[str]) -> None:
    config = benchmark.config_of(benchmark.parse([*quick, "--positions", "rotary", "--compile"]), "2x64")
    ours, fairseq, model, transformers = benchmark.parties(config, 5, Path("data"))
    values = {party.name: json.loads(party.command[4]) for party in (ours, model, transformers)}
    assert [(v["model"]["positions"], v["runtime"]["compile"]) for v in values.values()] == [
        ("rotary", True), ("learned", False), ("learned", False),
    ]  # fmt: skip
    assert ours.environment["OMP_NUM_THREADS"] == fairseq.environment["OMP_NUM_THREADS"] == "1"
    assert "MALLOC_TOP_PAD_" in ours.environment and "MALLOC_TOP_PAD_" not in fairseq.environment
    assert ours.read('{"tokens": 70}') == 70 and ours.read("a warning") is None
    line = '2026-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "loss": "8.1", "wps": "9000", "wpb": "1990.5"}'
    assert fairseq.read(line) == 5 * 1990.5 and fairseq.read("2026-01-01 | INFO | train | {}") is None


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--shapes", "2by4"], ["--positions", "none"]])
def test_wrong_options_end_early(benchmark: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
