"""Time to quality: both parties meet in one evaluation, and what is read off their budgets."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from train_then_compress.config import RobertaConfig

pytest.importorskip("fairseq")


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("time_to_quality")


def test_fairseqs_model_is_called_with_its_own_numbers(benchmark: ModuleType) -> None:
    """A token's logit, and the vector it is looked up by, stand in the row that fairseq-train has given it."""
    config = RobertaConfig(depth=1, width=32, head_size=16)
    theirs = benchmark.FairseqMaskedLM(config, 40, 8).eval()
    model = benchmark.Renumbered(theirs, 40)
    tokens = torch.tensor([[0, 4, 5, 39, 17, 2, 1, 1]])  # <s> <mask> first .. last, </s>, padding
    known = torch.tensor([[0, 39, 4, 38, 16, 2, 1, 1]])
    where = torch.tensor([1, 2])
    expected, found = theirs(known, where), model(tokens, where)
    order = [0, 1, 2, 3, 39, *range(4, 39)]
    assert torch.equal(found, expected[:, order])


@pytest.mark.parametrize(("loss", "seconds"), [(6.0, 10.0), (5.0, 10.0), (4.5, 20.0), (4.0, 40.0), (3.9, None)])
def test_the_time_to_a_loss_lies_between_the_budgets(benchmark: ModuleType, loss: float, seconds: float | None) -> None:
    runs = [{"seconds": 40.0, "loss": 4.0}, {"seconds": 10.0, "loss": 5.0}]
    assert benchmark.time_to(loss, runs) == (seconds if seconds is None else pytest.approx(seconds))


def test_everything_is_trained_and_compared(
    benchmark: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--not-alone", "--threads", "1", "--seconds", "0.5", "--text", str(text)]
    record = benchmark.main([*argv, "--cache", str(tmp_path)])
    ours, theirs = record["runs"].values()
    assert list(record["runs"]) == ["train_then_compress", "fairseq-train, rate 0.0005"]
    assert record["loss"] == theirs[0]["loss"] and ours[0]["seconds"] >= 0.5
    # Nothing has been learned in half a second: about the logarithm of the vocabulary.
    assert all(4 < run["loss"] < 8 for run in (*ours, *theirs))
    assert "seconds to a loss of" in capsys.readouterr().out
