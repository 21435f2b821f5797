"""The profile of a step at its smallest: kinds of operations, and shares that are all of a step."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("fairseq")


@pytest.fixture(scope="module")
def benchmark(benchmarks: Path) -> ModuleType:
    return importlib.import_module("step_profile")


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        (lambda x: x @ x, "matrix multiplications"),
        (lambda x: torch.nn.functional.linear(x, x, x[0]), "matrix multiplications"),
        (lambda x: torch.bmm(x[None], x[None]), "matrix multiplications"),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3), "attention kernel"),
        (lambda x: torch.nn.functional.cross_entropy(x, x.argmax(1)), "softmax, loss"),
        (lambda x: torch.nn.functional.layer_norm(x, x.shape[1:]), "norm"),
        (lambda x: torch.nn.functional.gelu(x), "activation"),
        (lambda x: torch.nn.functional.relu(x), "activation"),
        (lambda x: torch.nn.functional.dropout(x), "random numbers"),
        (lambda x: torch._foreach_norm([x]), "optimizer"),
        (lambda x: x.t().contiguous(), "copies, fills"),
        (lambda x: x.cumsum(0), "other operations"),
    ],
)
def test_operations_are_of_their_kind(benchmark: ModuleType, expression, kind: str) -> None:
    """What torch's profiler says of an expression of large matrices, forward."""
    x = torch.randn(700, 700)
    expression(x)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        expression(x)
    spent: dict[str, float] = {}
    for event in found.key_averages():
        spent[benchmark.kind(event.key)] = spent.get(benchmark.kind(event.key), 0) + event.self_cpu_time_total
    assert spent[kind] > 0
    assert benchmark.kind("autograd::engine::evaluate_function: MmBackward0") == benchmark.OUTSIDE


def test_the_shares_are_all_of_a_step(
    benchmark: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--quick", "--not-alone", "--threads", "1", "--dtype", "fp32", "--tasks", "masked_lm", "--text", str(text)]
    record = benchmark.main([*argv, "--cache", str(tmp_path)])
    ours, theirs = record["steps"]["masked_lm"]["1x32"].values()
    for seen in (ours, theirs):
        assert sum(seen["share"].values()) == pytest.approx(1) and min(seen["share"].values()) >= 0
        assert seen["share"]["matrix multiplications"] > 0 and seen["share"]["norm"] > 0
        assert seen["operations"]["aten::native_layer_norm"][1] == pytest.approx(5)
    assert "| masked_lm | 1x32 | fairseq's model in our loop |" in capsys.readouterr().out


def test_a_gpus_step_is_refused(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--device", "cuda"])
    assert "--device cuda: " in capsys.readouterr().err
