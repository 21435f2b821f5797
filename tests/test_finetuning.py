"""Finetuning from the outside: pretrain -> finetune -> compress, from a run or its milestones, given again, wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train_then_compress.analysis.table import load_study
from train_then_compress.records import RunDirectory, read_json, read_rows, write_json
from train_then_compress.training.checkpoint import CheckpointError
from train_then_compress.training.loop import Diverged

Ttc = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., list[Path]]
SMALL = [
    "model.depth=1", "model.width=32", "model.head_size=16", "model.positions=rotary", "runtime.threads=1",
    "runtime.dtype=fp32", "evaluation.points=3", "steps.prune.recovery.max_steps=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretraining(text_file: Path) -> list[str]:
    """Settings of a masked LM, to stand after ``pretrain.`` or alone."""
    return [
        f"data.train={text_file}", "data.vocab_size=400", "data.sequence_length=32", "budget.kind=steps",
        "budget.value=60", "optimizer.batch_size=8", "optimizer.lr=1e-2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finetuning(labelled_file: Path, cache: Path) -> list[str]:
    return [
        "task=classification", "data=csv_files", f"data.train={labelled_file}", "data.sequence_length=32",
        "optimizer=finetune", "optimizer.lr=5e-3", "optimizer.batch_size=16", "budget=epochs", "budget.value=8",
        f"paths.cache={cache}", "recipes=[none,quant4,prune30]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, ttc: Ttc, pretraining: list[str], finetuning: list[str]
) -> Path:
    """Two seeds finetuned from one masked LM, which the first of them pretrains."""
    directory = tmp_path_factory.mktemp("finetuning")
    nested = ["pretrain=mlm", "data@pretrain.data=text_files", *(f"pretrain.{setting}" for setting in pretraining)]
    done = ttc("run", "-m", *SMALL, *finetuning, *nested, "seed=0,1", "study=both", cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def runs_of(study: Path, task: str) -> list[Path]:
    return sorted(path.parent for path in study.glob(f"{task}-*/config.yaml"))


def weights_of(run: Path, stage: str) -> dict[str, torch.Tensor]:
    (path,) = run.glob(f"stages/{stage}-*/model.safetensors")
    return load_file(path)


def test_one_pretraining_serves_every_seed(workplace: Path) -> None:
    (masked_lm,) = runs_of(workplace / "runs/both", "mlm")
    finetuned = runs_of(workplace / "runs/both", "csv_files")
    assert masked_lm.name.startswith("mlm-d1-w32-steps60-s0-")
    assert [run.name.rsplit("-", 1)[0] for run in finetuned] == [f"csv_files-d1-w32-epochs8-s{seed}" for seed in (0, 1)]
    for run in finetuned:
        points = {row["recipe"]: row for row in RunDirectory(run).points().values()}
        assert set(points) == {"none", "quant4", "prune30"}
        assert points["none"]["test_accuracy"] > 0.5 and points["quant4"]["bytes"] < points["none"]["bytes"]
        (record,) = (read_json(path) for path in run.glob("stages/finetune-*/record.json"))
        (pretrained,) = (read_json(path) for path in masked_lm.glob("stages/pretrain-*/record.json"))
        assert record["origin"]["run"] == masked_lm.name and record["origin"]["clock"] == pretrained["clock"]
        assert record["clock"]["steps"] == round(8 * record["corpus"]["splits"]["train"]["examples"] / 16)
    head = [weights_of(run, "finetune")["head.weight"] for run in finetuned]
    assert not torch.equal(*head)


def test_given_again_nothing_is_done(workplace: Path, ttc: Ttc, pretraining: list[str], finetuning: list[str]) -> None:
    nested = ["pretrain=mlm", "data@pretrain.data=text_files", *(f"pretrain.{setting}" for setting in pretraining)]
    again = ttc("run", "-m", *SMALL, *finetuning, *nested, "seed=0,1", "study=both", cwd=workplace)
    assert "2 runs, 2 done; nothing to do" in again.stdout


def test_init_from_gives_the_same_weights_as_pretraining_within(
    workplace: Path, run_here: RunHere, finetuning: list[str], untimed: None
) -> None:
    (masked_lm,) = runs_of(workplace / "runs/both", "mlm")
    settings = [setting for setting in SMALL if not setting.startswith("model.")]  # the model comes from the run
    (run,) = run_here(*settings, *finetuning, f"init_from={masked_lm}", "study=from", "recipes=[none]", cwd=workplace)
    first = runs_of(workplace / "runs/both", "csv_files")[0]
    assert run.name == first.name
    expected = weights_of(first, "finetune")
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(run, "finetune").items())


def test_milestones_of_a_run_can_be_compressed_and_finetuned(
    tmp_path: Path, run_here: RunHere, text_file: Path, cache: Path, finetuning: list[str], untimed: None
) -> None:
    """Without training: the milestone's own weights, its own clock, and a quality between those of other progress."""
    masked_lm = [
        "data=text_files", f"data.train={text_file}", "data.vocab_size=400", "data.sequence_length=32", "budget=steps",
        "budget.value=60", "optimizer.batch_size=8", "optimizer.lr=1e-2", f"paths.cache={cache}",
    ]  # fmt: skip
    kept = ["checkpoint.keep_at=[0.25,0.5]", "checkpoint.keep_at_perplexity=[300,1.5]", "evaluation.points=20"]
    (trunk,) = run_here(*SMALL, *masked_lm, *kept, "study=kept", cwd=tmp_path)
    settings = [setting for setting in SMALL if not setting.startswith("model.")]
    starts = ",".join(f"{trunk}@{at}" for at in ("0.25", "0.5", "perplexity300"))
    common = [*settings, f"paths.cache={cache}", "study=at"]
    found = run_here("-m", *common, f"init_from={starts}", "recipes=[none,quant4]", cwd=tmp_path)
    runs = {run.name.split("@")[1].split("-")[0]: run for run in found}
    records = {at: read_json(next(run.glob("stages/milestone-*/record.json"))) for at, run in runs.items()}
    assert records["0.25"]["clock"]["steps"] == 15 and records["0.5"]["clock"]["steps"] == 30
    rows = [row for row in read_rows(trunk / "metrics.jsonl") if row["split"] == "validation"]
    reached = next(row for row in rows if row["perplexity"] <= 300)
    assert records["perplexity300"]["validation"]["perplexity"] == pytest.approx(reached["perplexity"], rel=1e-5)
    assert records["0.5"]["validation"]["loss"] < records["0.25"]["validation"]["loss"]
    assert not any(path.exists() for path in runs["0.5"].glob("checkpoint"))
    variants = " ".join(load_study(tmp_path / "runs/at").runs["variant"])
    assert "milestone=0.25" in variants and "milestone=perplexity300" in variants
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no milestone 0\.75"):
            run_here(*common, f"init_from={trunk}@0.75", cwd=tmp_path)
        (missing,) = (path.parent for path in tmp_path.glob("runs/at/*/config.yaml") if "@0.75-" in str(path))
        assert not (missing / "failure.json").exists()
        write_json(missing / "failure.json", {"reason": "the loss is nan"})  # of an earlier attempt
    run_here(*settings, *finetuning, f"init_from={trunk}@0.5", "recipes=[none]", "study=tuned", cwd=tmp_path)


def test_a_pretraining_that_diverges_is_what_failed(
    tmp_path: Path, run_here: RunHere, pretraining: list[str], finetuning: list[str], untimed: None
) -> None:
    nested = ["pretrain=mlm", "data@pretrain.data=text_files", *(f"pretrain.{setting}" for setting in pretraining)]
    with pytest.raises(Diverged, match="not finite"):
        run_here(*SMALL, *finetuning, *nested, "pretrain.optimizer.weight_decay=1e30", "study=bad", cwd=tmp_path)
    (failure,) = tmp_path.glob("runs/bad/*/failure.json")
    assert failure.parent.name.startswith("mlm-")
    assert load_study(tmp_path / "runs/bad").runs["failure"].str.contains("not finite").tolist() == [True]


def test_table_and_figures_show_accuracy_against_cost(workplace: Path, ttc: Ttc) -> None:
    table = ttc("table", "both", cwd=workplace)
    assert table.returncode == 0 and "majority" in table.stdout and "unigram" in table.stdout
    figures = ttc("figures", "both", cwd=workplace)
    assert figures.returncode == 0, figures.stderr
    names = {Path(line).name for line in figures.stdout.splitlines()}
    assert any(name.startswith("test_accuracy_by_bytes-classification") for name in names)
    assert not any(name.startswith("test_perplexity_by_bytes-classification") for name in names)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["task=classification"], "data=sotu_wiki: text without labels"),
        (["data=rotten_tomatoes"], "data=rotten_tomatoes: labelled text; it needs task=classification"),
        (["task=classification", "data=rotten_tomatoes"], "init_from=None: task=classification needs"),
        (["budget=epochs"], "budget.kind=epochs: only task=classification counts epochs"),
        (["pretrain=mlm"], "pretrain=..: only task=classification"),
        (["init_from=nowhere"], "init_from=nowhere: no finished pretraining there"),
        (["init_from=nowhere@2"], "init_from=nowhere@2: expected RUN_DIRECTORY@PROGRESS"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_words(
    overrides: list[str], words: str, ttc_here: Ttc, tmp_path: Path
) -> None:
    done = ttc_here("run", *overrides, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_another_shape_than_that_of_init_from_is_refused(workplace: Path, ttc_here: Ttc, finetuning: list[str]) -> None:
    (masked_lm,) = runs_of(workplace / "runs/both", "mlm")
    done = ttc_here("run", *finetuning, f"init_from={masked_lm}", "model.depth=3", cwd=workplace)
    assert done.returncode == 2 and f"model.depth=3: init_from={masked_lm} has 1" in done.stderr
