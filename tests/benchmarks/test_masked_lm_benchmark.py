"""The masked-LM benchmark at its smallest: what it measures is written down; how fast is not looked at."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from train_then_compress.data.masked import Sequences
from train_then_compress.data.prepare import Prepared

pytest.importorskip("fairseq")


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("masked_lm_training")


@pytest.fixture(scope="module")
def fairseq_train(benchmarks: Path) -> ModuleType:
    return importlib.import_module("common.fairseq_train")


def test_all_parties_are_measured(
    benchmark: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--text", str(text), "--cache", str(tmp_path), "--vocab-size", "300", "--threads", "1"]
    record = benchmark.main([*argv, "--dtype", "fp32", "--not-alone"])
    (measured,) = record["shapes"].values()
    names = ["train_then_compress", "fairseq-train", "fairseq's model in our loop", "transformers Trainer"]
    assert list(measured["parties"]) == names and list(measured["ratio"]) == names[1:]
    for facts in measured["parties"].values():
        assert facts["tokens_per_second"]["median"] > 0 and len(facts["intervals"]) == 1
    ours, *theirs = (facts["by_turn"][0] for facts in measured["parties"].values())
    assert [ratio["by_round"] for ratio in measured["ratio"].values()] == [[ours / speed] for speed in theirs]
    # 1x32, 16 tokens: 12 width^2 weights and 4 length * width of attention in the layer, 2 FLOPs each and 3 passes;
    # 15 % of the positions are predicted; padding is computed and not counted.
    positions = 3 * 2 * (12 * 32**2 + 2 * 16 * 32 + 0.15 * (32**2 + 300 * 32))
    assert positions < measured["flops_per_token"] < 1.5 * positions
    printed = capsys.readouterr().out
    assert all(f"| 1x32 | {name} |" in printed for name in names) and record["command"] in printed


def test_fairseq_reads_the_same_sentences(fairseq_train: ModuleType, prepared: Prepared, tmp_path: Path) -> None:
    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    fairseq_train.binarize(prepared, tmp_path)
    task = MaskedLMTask.setup_task(
        MaskedLMConfig(data=str(tmp_path), tokens_per_sample=32, sample_break_mode="complete")
    )
    assert len(task.dictionary) == prepared.vocab_size and task.mask_idx == prepared.vocab_size - 1
    ours, theirs = Sequences(prepared, "train", 32), task._load_dataset_split("train", 1, False)
    tokens = [theirs[number].numpy() for number in range(len(theirs))]
    assert sum(len(row) - 1 for row in tokens) == len(prepared.tokens("train"))
    first = ours.rows(np.arange(1))[0]
    first = first[: len(tokens[0])]
    assert np.array_equal(tokens[0], fairseq_train.numbering(prepared.vocab_size)[first])


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--shapes", "2by4"], ["--positions", "none"]])
def test_wrong_options_end_early(benchmark: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(wrong)


def test_the_log_of_fairseq_train_is_read(fairseq_train: ModuleType) -> None:
    read = fairseq_train.tokens_of(20)
    line = '2026-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "loss": "8.1", "wps": "9000", "wpb": "1990.5"}'
    assert read(line) == 20 * 1990.5
    assert read("2026-01-01 00:00:00 | INFO | train | {}") is None
