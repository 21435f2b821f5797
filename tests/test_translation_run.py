"""`ttc run` on parallel text from the outside: a whole run, killed and gone on with, its table and its figures."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train_then_compress.analysis.figures import draw_study
from train_then_compress.analysis.table import load_study, render
from train_then_compress.cell import adopt, locate
from train_then_compress.compression.packing import unpack
from train_then_compress.config import Config, ConfigError
from train_then_compress.evaluation.bleu import score
from train_then_compress.evaluation.translation import translate
from train_then_compress.models.transformer import Translator
from train_then_compress.records import RunDirectory, read_json, read_rows
from train_then_compress.run import Run
from train_then_compress.tasks import TranslationTask, task_of

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(parallel_files: Path, cache: Path) -> list[str]:
    """Those of `translator_run`."""
    splits = [f"data.{split}={parallel_files / split}" for split in ("train", "valid", "test")]
    return [
        "task=translation", "model=transformer", "data=parallel_files", *splits, "data.target=xx",
        "data.vocab_size=400", f"paths.cache={cache}", "model.depth=1", "model.width=64", "model.head_size=16",
        "model.positions=rotary", "budget=steps", "budget.value=150", "optimizer.lr=5e-3",
        "optimizer.batch_tokens=1024", "runtime.threads=1", "runtime.dtype=fp32", "evaluation.points=3",
        "evaluation.bleu_sentences=10", "evaluation.test_sequences=20", "evaluation.beam=2",
        "checkpoint.every_seconds=0", "recipes=[none,quant4]", "study=killed",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, settings: list[str], ttc: Command, kill_at: Callable[..., None]
) -> Path:
    """The directory of a run that was killed in the middle and gone on with."""
    directory = tmp_path_factory.mktemp("translation")
    kill_at(directory, ["run", *settings], "pretrain", 60)
    finished = ttc("run", *settings, cwd=directory)
    assert finished.returncode == 0, finished.stderr
    (path,) = (path.parent for path in directory.glob("runs/killed/*/config.yaml"))
    return path


def test_killed_in_the_middle_it_ends_in_the_same_weights(
    run: Path, translator_run: Path, assert_same_weights: Callable[[Path, Path], None]
) -> None:
    assert run.name == translator_run.name and run.name.startswith("mt-d1-w64-steps150-s0-")
    assert_same_weights(run, translator_run)
    rows, calm = ([(row["split"], row["steps"], row.get("bleu")) for row in read_rows(path / "metrics.jsonl")]
                  for path in (run, translator_run))  # fmt: skip
    assert rows == calm and len(rows) == len(set(rows))


def test_bleu_rises_above_that_of_copying_and_stands_in_every_record(run: Path) -> None:
    curve = [row["bleu"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "validation"]
    record = read_json(next(run.glob("stages/pretrain-*/record.json")))
    assert curve[-1] == record["validation"]["bleu"] > 5 + max(curve[0], record["corpus"]["copy_bleu"]["valid"])
    rows = {row["recipe"]: row for row in RunDirectory(run).points().values()}
    assert set(rows) == {"none", "quant4"}
    for row in rows.values():
        assert row["test_bleu_low"] <= row["test_bleu"] <= row["test_bleu_high"] and row["test_bleu_sentences"] == 20
        assert "version:" in row["bleu_signature"] and "nc:6" in row["chrf_signature"]
        assert row["throughput"] > 0 and row["throughput_beam"] > 0 and row["latency_ms"] > 0
    dense = rows["none"]
    assert rows["quant4"]["bytes"] < 0.5 * dense["bytes"] == 0.5 * dense["bytes_bf16"]
    assert dense["parameters"] - dense["parameters_without_embeddings"] == 400 * 64


def test_the_packed_file_gives_the_translations_that_were_scored(run: Path) -> None:
    config = Config.load(run / "config.yaml")
    task = task_of(config, locate(config).data)
    assert isinstance(task, TranslationTask)
    torch.set_num_threads(1)
    for row in RunDirectory(run).points().values():
        model = unpack(run / "stages" / row["stage"] / "packed.safetensors", task.new_model()).model
        assert isinstance(model, Translator)
        sources, references = task.pairs.texts("test")
        found = translate(model, task.tokenizer, sources[:20], task.decoding(2), 512)
        assert score(found, references[:20])["bleu"] == pytest.approx(row["test_bleu"], abs=1e-9)


def test_table_and_figures_show_bleu_against_costs(run: Path, tmp_path: Path) -> None:
    loaded = load_study(run.parent)
    assert loaded.missing == []
    table = render(loaded.points, "md")
    assert "test BLEU" in table and "test chrF" in table and "copy" in table and "perplexity" not in table
    copied, dense, _ = loaded.points.to_dict("records")
    assert copied["recipe"] == "copy" and copied["test_bleu"] < dense["test_bleu"] and copied["test_chrf"] > 0
    assert dense["corpus"] == "parallel_files:en-xx" and dense["task"] == "translation"
    assert loaded.points["frontier"].any() and loaded.points["ruined"].tolist() == [True, False, False]
    names = {path.stem for path in draw_study(run.parent, tmp_path)}
    wanted = {"bytes", "nonzero", "throughput_beam"}
    assert {f"test_{measure}_by_{cost}" for measure in ("bleu", "chrf") for cost in wanted} <= names
    assert {"convergence_seconds", "convergence_steps"} <= names


def test_given_again_nothing_is_done(run: Path, settings: list[str], ttc: Command) -> None:
    again = ttc("run", *settings, cwd=run.parents[2])
    assert again.returncode == 0 and "1 runs, 1 done; nothing to do" in again.stdout


def test_no_classifier_is_made_of_a_translator(run: Path) -> None:
    config = Config.build({
        "task": {"name": "classification"}, "data": {"name": "rotten_tomatoes"}, "init_from": str(run),
    })  # fmt: skip
    with pytest.raises(ConfigError, match="a translation model; task=classification finetunes a masked LM"):
        adopt(config)


def test_a_finished_translator_is_compressed_as_it_stands(run: Path, tmp_path: Path, untimed: None) -> None:
    """With what its run says of task, data and model."""
    own = Config.load(run / "config.yaml")
    config = adopt(Config.build({
        "init_from": str(run), "recipes": ["none"], "study": "again", "evaluation": dataclasses.asdict(own.evaluation),
        "runtime": {"dtype": "fp32", "threads": 1}, "paths": {"runs": str(tmp_path), "cache": own.paths.cache},
    }))  # fmt: skip
    cell = locate(config)
    Run(cell).work()
    (row,) = cell.directory.points().values()
    dense = next(row for row in RunDirectory(run).points().values() if row["recipe"] == "none")
    assert row["test_bleu"] == dense["test_bleu"] and cell.plan.dense.name == "milestone"
