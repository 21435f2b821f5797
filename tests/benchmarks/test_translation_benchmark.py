"""The translation benchmark at its smallest: every party trains, and what is measured is written down."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from train_then_compress.config import BudgetConfig

pytest.importorskip("fairseq")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CIFRE = ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"]


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("translation_training")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand numbers read out in two languages, digit by digit."""
    path = tmp_path_factory.mktemp("pairs") / "numbers.tsv"
    lines, numbers = [], [str(7**number % 10**9 + 10**5) for number in range(1000)]
    lines = [
        "\t".join(" ".join(words[int(digit)] for digit in number) for words in (DIGITS, CIFRE)) for number in numbers
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def quick(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.getbasetemp() / "translation_cache"
    return ["--quick", "--pairs", str(pairs), "--cache", str(cache), "--vocab-size", "300", "--threads", "1",
            "--dtype", "fp32", "--not-alone"]  # fmt: skip


@pytest.mark.parametrize("party", ["ours", "fairseq_model", "transformers"])
def test_every_party_trains(
    benchmark: ModuleType, quick: list[str], one_interval: Callable[..., int], party: str
) -> None:
    config = benchmark.config_of(benchmark.parse(quick), "1x32")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, batch_size=8))
    tokens = one_interval(importlib.import_module("parties.translation").PARTIES[party], config, 3)
    assert 3 * 100 < tokens <= 3 * 512


def test_fairseq_train_takes_its_command(
    benchmark: ModuleType, quick: list[str], fairseq_interval: Callable[..., float], tmp_path: Path
) -> None:
    config = benchmark.config_of(benchmark.parse(quick), "1x32")
    config = dataclasses.replace(config, budget=BudgetConfig(kind="steps", value=4))
    prepared = benchmark.prepare_pairs(config.data, Path(config.paths.cache))
    benchmark.export_fairseq(prepared, tmp_path / "data")
    task = benchmark.TranslationTask(config, prepared, 0)
    _, party, *_ = benchmark.parties(config, 3, tmp_path / "data", task)
    assert 3 * 200 < fairseq_interval(party.command, party.read) <= 3 * 512


@pytest.mark.usefixtures("made_up_turns")
def test_the_record_compares_all_parties(
    benchmark: ModuleType, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record = benchmark.main(quick)
    (measured,) = record["shapes"].values()
    names = ["train_then_compress", "fairseq-train", "fairseq's model in our loop", "transformers Marian"]
    assert list(measured["parties"]) == names and 0 <= record["padding"] < 0.3
    printed = capsys.readouterr().out
    assert all(f"| 1x32 | {name} |" in printed for name in names) and "padding in ours" in printed


def test_the_source_is_added_to_what_fairseq_counts(benchmark: ModuleType, quick: list[str]) -> None:
    config = benchmark.config_of(benchmark.parse(quick), "1x32")
    prepared = benchmark.prepare_pairs(config.data, Path(config.paths.cache))
    split = prepared.split("train")
    both, target = len(split.tokens) + 2 * len(split), sum(len(split.sides(n)[1]) + 1 for n in range(len(split)))
    read = benchmark._both_sides(prepared, 10)
    assert read('| train_inner | {"wpb": "50"}') == pytest.approx(10 * 50 * both / target)
    assert read("anything else") is None
