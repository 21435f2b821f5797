"""Structured pruning and low rank as whole steps of a recipe, for every task: calibrated, recovered, done once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.recipe import compress
from train_then_compress.records import RunDirectory, plan
from train_then_compress.tasks import RunTask
from train_then_compress.tracking.metrics import MetricsLog

#: From a recipe and the settings of its steps: what its stages make of a fresh model, in a run's directory.
Made = Callable[[str, dict[str, Any], Path], tuple[Compressed, Bench]]


@pytest.fixture(params=["mlm", "classification", "translation"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def made(kind: str, build_task: Callable[..., RunTask]) -> Made:
    """Validation quality never reaches the dense one, which is said to be 100: recovery takes all its steps."""

    def make(recipe: str, steps: dict[str, Any], directory: Path) -> tuple[Compressed, Bench]:
        task = build_task(
            kind, model={"depth": 2, "head_size": 8}, evaluation={"validation_sequences": 16}, optimizer={"lr": 3e-3},
            recipes=[recipe], steps=steps,
        )  # fmt: skip
        planned, run, model = plan(task.config, "data", {}), RunDirectory(directory), task.new_model()
        bench = Bench(task, task.config, run, MetricsLog(run.metrics), 100.0, model, planned.dense)
        return compress(model, planned.recipes[recipe], bench), bench

    return make


def records_of(bench: Bench, recipe: str) -> list[dict[str, Any]]:
    keys = plan(bench.config, "data", {}).recipes[recipe]
    return [record for key in keys if (record := bench.run.stage_record(key))]


def tokens_of(bench: Bench, recipe: str, batches: int) -> list[int]:
    """In the batches that each stage of a recipe calibrates on, drawn by a seed of its own."""
    keys = plan(bench.config, "data", {}).recipes[recipe]
    tasks = [bench.task.with_seed(int(key.id[:7], 16)) for key in keys]
    return [sum(task.counts(task.batch(step)).tokens for step in range(batches)) for task in tasks]


def recovery(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "check_every": 20, "lr_factor": 1}


def equal(one: Compressed, other: Compressed) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.structure == other.structure and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_structured_increments_are_recovered_and_done_once(
    made: Made, kind: str, tmp_path: Path, importance: str
) -> None:
    settings = {"increment": 25, "importance": importance, "scope": "global", "calibration_batches": 2}
    steps = {"structured": settings | {"recovery": recovery(3)}}
    compressed, bench = made("structured50", steps, tmp_path)
    attentions, layers = (6, 4) if kind == "translation" else (2, 2)
    assert [sum(entry["heads"]) for entry in compressed.structure] == [3 * attentions, 2 * attentions]
    assert [sum(entry["ffn"]) for entry in compressed.structure] == [96 * layers, 64 * layers]
    records = records_of(bench, "structured50")
    assert [record["clock"]["steps"] for record in records] == [3, 3]
    tokens = tokens_of(bench, "structured50", 2 if importance == "taylor" else 0)
    assert [record["calibration_tokens"] for record in records] == tokens
    again, _ = made("structured50", steps, tmp_path)
    assert equal(again, compressed) and bench.task.evaluate(again.model, "test").facts["loss"] > 0


@pytest.mark.parametrize("weighting", ["activations", "none"])
def test_low_rank_is_calibrated_recovered_and_done_once(made: Made, kind: str, tmp_path: Path, weighting: str) -> None:
    settings = {"weighting": weighting, "embeddings": True, "calibration_batches": 2, "recovery": recovery(3)}
    compressed, bench = made("svd40", {"svd": settings}, tmp_path)
    (record,) = records_of(bench, "svd40")
    tokens = tokens_of(bench, "svd40", 2 if weighting == "activations" else 0)
    assert record["clock"]["steps"] == 3 and [record["calibration_tokens"]] == tokens
    vocabulary = bench.task.vocab_size  # type: ignore[attr-defined]
    expected = [9, 6, 10, 10] * 2 + ([9, 6, 10, 10, 6, 8, 6] * 2 if kind == "translation" else [])
    expected.append(40 * vocabulary * 32 // (100 * (vocabulary + 32)))
    assert compressed.structure[0]["ranks"] == expected
    again, _ = made("svd40", {"svd": settings}, tmp_path)
    assert equal(again, compressed) and bench.task.evaluate(again.model, "test").facts["loss"] > 0


@pytest.mark.parametrize("recipe", ["structured50", "svd50", "structured50+svd50"])
def test_recovery_trains_the_smaller_model(made: Made, tmp_path: Path, recipe: str) -> None:
    results = []
    for steps in (0, 60):
        common = {"calibration_batches": 2, "recovery": recovery(steps)}
        results.append(made(recipe, {"structured": common | {"increment": 99}, "svd": common}, tmp_path / str(steps)))
    (before, bench), (after, _) = results
    shapes = [[parameter.shape for parameter in compressed.model.parameters()] for compressed in (before, after)]
    assert shapes[0] == shapes[1] and sum(shape.numel() for shape in shapes[0]) < sum(
        parameter.numel() for parameter in bench.teacher.parameters()
    )
    loss = [bench.task.evaluate(compressed.model, "valid").facts["loss"] for compressed in (before, after)]
    assert loss[1] < loss[0] - 0.1


@pytest.mark.parametrize(
    "recipe",
    [
        "structured30+svd50+prune30+quant4",
        "structured30+svd50+wanda30+gptq4",
        "svd60+structured50+kmeans4",
        "svd80+svd40",
    ],
)
def test_they_stand_before_pruning_and_quantization(made: Made, tmp_path: Path, recipe: str) -> None:
    """Every stage is read back where the recipe goes on from it."""
    methods = ("structured", "svd", "prune", "wanda")
    steps: dict[str, Any] = {method: {"recovery": recovery(0)} for method in methods}
    steps["structured"]["units"] = ["heads", "ffn", "layers"]
    steps["svd"]["embeddings"] = True
    compressed, bench = made(recipe, steps, tmp_path)
    again, _ = made(recipe, steps, tmp_path)
    assert equal(again, compressed) and again.codes.keys() == compressed.codes.keys()
    quantized, pruned = recipe != "svd80+svd40", "prune" in recipe or "wanda" in recipe
    assert bool(compressed.codes) == quantized and bool(compressed.masks) == pruned
    assert bench.task.evaluate(compressed.model, "valid").facts["loss"] > 0
    assert bench.task.flops_per_token(compressed.model) < bench.task.flops_per_token(bench.teacher)
