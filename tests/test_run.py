"""`ttc run` from the outside: whole runs on a small corpus, given again, extended, branched."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_then_compress.compression.packing import unpack
from train_then_compress.config import Config, ConfigError
from train_then_compress.data.prepare import prepare
from train_then_compress.records import RunDirectory, read_json, read_rows
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.training import interrupt

Command = Callable[..., subprocess.CompletedProcess[str]]
Compare = Callable[[Path, Path], None]
RunHere = Callable[..., list[Path]]


def runs_of(study: Path) -> list[Path]:
    return sorted(path.parent for path in study.glob("*/config.yaml"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, common: list[str], ttc: Command) -> Path:
    """Two shapes, three recipes."""
    directory = tmp_path_factory.mktemp("study")
    recipes = "recipes=[none,quant4,prune15,prune30+quant4]"
    done = ttc("run", "-m", *common, "study=two", "model.width=32,64", recipes, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "runs" / "two"


def test_a_run_leaves_what_the_design_says(study: Path) -> None:
    runs = runs_of(study)
    assert [run.name.rsplit("-", 1)[0] for run in runs] == ["mlm-d1-w32-steps30-s0", "mlm-d1-w64-steps30-s0"]
    for run in runs:
        stages = {path.name.rsplit("-", 1)[0] for path in (run / "stages").iterdir()}
        assert stages == {"pretrain", "quant4", "prune15", "prune30"}
        assert len(list((run / "stages").iterdir())) == 5  # quant4 of the dense and of the pruned model
        points = RunDirectory(run).points()
        assert {row["recipe"] for row in points.values()} == {"none", "quant4", "prune15", "prune30+quant4"}
        assert set(read_json(run / "result.json")["points"].values()) == set(points)
        assert not list(run.glob("checkpoint/*/step-*"))


def test_a_packed_point_gives_back_what_was_evaluated_and_its_size_is_the_files(study: Path) -> None:
    run = runs_of(study)[1]
    config = Config.load(run / "config.yaml")
    task = MaskedLMTask(config, prepare(config.data, Path(config.paths.cache)), config.seed)
    torch.set_num_threads(1)
    for row in RunDirectory(run).points().values():
        path = run / "stages" / row["stage"] / "packed.safetensors"
        assert path.stat().st_size == row["bytes"]
        quality = task.evaluate(unpack(path, task.new_model()).model, "test")
        assert quality.facts["loss"] == pytest.approx(row["test_loss"], abs=1e-6), row["recipe"]


def test_pruning_to_fifteen_and_thirty_per_cent_is_what_the_rows_say(study: Path) -> None:
    points = {row["recipe"]: row for row in RunDirectory(runs_of(study)[0]).points().values()}
    dense, pruned = points["none"], points["prune15"]
    matrices = dense["parameters"] - pruned["nonzero"]
    share = matrices / sum(
        t.numel() for n, t in load_file(next(runs_of(study)[0].glob("stages/pretrain*/model.safetensors"))).items()
        if t.dim() == 2 and not n.endswith("positions")
    )  # fmt: skip
    assert share == pytest.approx(0.15, abs=0.002)
    assert points["quant4"]["bytes"] < 0.45 * dense["bytes_bf16"] < 0.25 * dense["bytes_fp32"]
    assert pruned["flops_per_token_nonzero"] < dense["flops_per_token_nonzero"] == dense["flops_per_token"]


def test_given_again_it_does_nothing_and_a_deleted_run_alone_is_done_again(
    study: Path, common: list[str], ttc: Command, assert_same_weights: Compare
) -> None:
    arguments = ["run", "-m", *common, "study=two", "model.width=32,64", "recipes=[none,quant4,prune15,prune30+quant4]"]
    again = ttc(*arguments, cwd=study.parents[1])
    assert again.returncode == 0 and "2 runs, 2 done; nothing to do" in again.stdout
    narrow, wide = runs_of(study)
    before = {path: path.stat().st_mtime_ns for path in narrow.rglob("*") if path.is_file()}
    kept = wide.rename(study.parent / "kept")
    assert ttc(*arguments, cwd=study.parents[1]).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in narrow.rglob("*") if path.is_file()} == before
    assert_same_weights(kept, wide)


def test_a_signal_between_recipes_stops_before_the_next(
    study: Path, common: list[str], run_here: RunHere, monkeypatch: pytest.MonkeyPatch, untimed: None
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(interrupt.Interrupted, match="stopped before the recipe quant8"):
        run_here(*common, "study=two", "model.width=32", "recipes=[none,quant8]", cwd=study.parents[1])


def test_another_recipe_trains_nothing_again(study: Path, common: list[str], run_here: RunHere, untimed: None) -> None:
    run = runs_of(study)[0]
    records = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/record.json")}
    assert run_here(*common, "study=two", "recipes=[none,quant8,prune30]", cwd=study.parents[1]) == [run]
    after = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/record.json")}
    assert {path: after[path] for path in records} == records
    assert {path.parent.name.rsplit("-", 1)[0] for path in after.keys() - records.keys()} == {"quant8"}


def test_a_branch_starts_from_its_milestone_and_refuses_a_spent_budget(
    tmp_path: Path, common: list[str], run_here: RunHere, untimed: None
) -> None:
    wsd = [*common, "optimizer.schedule=wsd", "study=wsd"]
    (trunk,) = run_here(*wsd, "checkpoint.keep_at=[0.5]", cwd=tmp_path)
    (branch,) = run_here(*wsd, f"branch_from={trunk}@0.5", "budget.value=20", cwd=tmp_path)
    (record,) = (json.loads(path.read_text()) for path in branch.glob("stages/pretrain-*/record.json"))
    assert record["clock"]["steps"] == 20
    assert min(row["steps"] for row in read_rows(branch / "metrics.jsonl")) > 15
    with pytest.raises(ConfigError, match=r"budget\.value=16\.0: already spent"):
        run_here(*wsd, f"branch_from={trunk}@0.5", "budget.value=16", cwd=tmp_path)


def test_without_wandb_training_goes_on_with_a_warning(
    tmp_path: Path, common: list[str], ttc: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = ttc("run", *common, "study=plain", "tracker=wandb", "budget.value=3", "optimizer.warmup=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wandb" in done.stderr.lower()
