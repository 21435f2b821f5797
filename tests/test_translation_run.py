"""`ttc run` on parallel text from the outside: a whole run, killed and gone on with, its table and its figures."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train_then_compress.analysis.figures import draw_study
from train_then_compress.analysis.table import load_study, render
from train_then_compress.cell import locate
from train_then_compress.compression.packing import unpack
from train_then_compress.config import Config
from train_then_compress.evaluation.bleu import score
from train_then_compress.evaluation.translation import translate
from train_then_compress.models.transformer import Translator
from train_then_compress.records import RunDirectory, read_json, read_rows
from train_then_compress.tasks import TranslationTask, task_of

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(parallel_files: Path, cache: Path) -> list[str]:
    splits = [f"data.{split}={parallel_files / split}" for split in ("train", "valid", "test")]
    return [
        "task=translation", "model=transformer", "data=parallel_files", *splits, "data.target=xx",
        "data.vocab_size=400", f"paths.cache={cache}", "model.depth=1", "model.width=64", "model.head_size=16",
        "model.positions=rotary", "budget=steps", "budget.value=150", "optimizer.lr=5e-3",
        "optimizer.batch_tokens=1024", "runtime.threads=1", "runtime.dtype=fp32", "evaluation.points=3",
        "evaluation.bleu_sentences=20", "checkpoint.every_seconds=0", "recipes=[none,quant4]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, settings: list[str], ttc: Command, kill_at: Callable[..., None]
) -> Path:
    """The same run twice: once in one go, once killed in the middle."""
    directory = tmp_path_factory.mktemp("translation")
    done = ttc("run", *settings, "study=calm", cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = ["run", *settings, "study=killed"]
    kill_at(directory, arguments, "pretrain", 60)
    finished = ttc(*arguments, cwd=directory)
    assert finished.returncode == 0, finished.stderr
    return directory / "runs"


@pytest.fixture(scope="module")
def run(study: Path) -> Path:
    (path,) = (path.parent for path in study.glob("calm/*/config.yaml"))
    return path


def test_killed_in_the_middle_it_ends_in_the_same_weights(
    study: Path, run: Path, assert_same_weights: Callable[[Path, Path], None]
) -> None:
    assert run.name.startswith("mt-d1-w64-steps150-s0-")
    assert_same_weights(run, study / "killed" / run.name)
    rows = read_rows(study / "killed" / run.name / "metrics.jsonl")
    kept = [(row["split"], row["steps"], row.get("bleu")) for row in rows]
    assert len(rows) == len(set(kept))
    assert kept == [(row["split"], row["steps"], row.get("bleu")) for row in read_rows(run / "metrics.jsonl")]


def test_bleu_rises_above_that_of_copying_and_stands_in_every_record(run: Path) -> None:
    curve = [row["bleu"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "validation"]
    record = read_json(next(run.glob("stages/pretrain-*/record.json")))
    assert curve[-1] == record["validation"]["bleu"] > 5 + max(curve[0], record["corpus"]["copy_bleu"]["valid"])
    rows = {row["recipe"]: row for row in RunDirectory(run).points().values()}
    assert set(rows) == {"none", "quant4"}
    for row in rows.values():
        assert row["test_bleu_low"] <= row["test_bleu"] <= row["test_bleu_high"] and row["test_bleu_sentences"] == 40
        assert "version:" in row["bleu_signature"] and "chrF2" in row["chrf_signature"]
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
        found = translate(model, task.tokenizer, sources, task.decoding(5), 512)
        assert score(found, references)["bleu"] == pytest.approx(row["test_bleu"], abs=1e-9)


def test_table_and_figures_show_bleu_against_costs(study: Path, tmp_path: Path) -> None:
    loaded = load_study(study / "calm")
    assert loaded.missing == []
    table = render(loaded.points, "md")
    assert "test BLEU" in table and "test chrF" in table and "copy" in table and "perplexity" not in table
    copied, dense, _ = loaded.points.to_dict("records")
    assert copied["recipe"] == "copy" and copied["test_bleu"] < dense["test_bleu"] and copied["test_chrf"] > 0
    assert dense["corpus"] == "parallel_files:en-xx" and dense["task"] == "translation"
    assert loaded.points["frontier"].any() and not loaded.points["ruined"].any()
    names = {path.stem for path in draw_study(study / "calm", tmp_path)}
    wanted = {"bytes", "nonzero", "throughput_beam"}
    assert {f"test_{measure}_by_{cost}" for measure in ("bleu", "chrf") for cost in wanted} <= names
    assert {"convergence_seconds", "convergence_steps"} <= names


def test_given_again_or_with_another_beam_nothing_is_trained(
    study: Path, settings: list[str], ttc: Command, run: Path
) -> None:
    again = ttc("run", *settings, "study=calm", cwd=study.parent)
    assert again.returncode == 0 and "1 runs, 1 done; nothing to do" in again.stdout
    record = next(run.glob("stages/pretrain-*/record.json"))
    before = record.stat().st_mtime_ns
    greedy = ttc("run", *settings, "study=calm", "evaluation.beam=1", "recipes=[none]", cwd=study.parent)
    assert greedy.returncode == 0 and record.stat().st_mtime_ns == before, greedy.stderr
    assert len(RunDirectory(run).points()) == 3


def test_a_milestone_is_compressed_as_it_stands_and_no_classifier_is_made_of_it(
    study: Path, settings: list[str], ttc: Command, run: Path, tmp_path: Path
) -> None:
    refused = ttc("run", "task=classification", "data=rotten_tomatoes", f"init_from={run}", cwd=tmp_path)
    assert refused.returncode == 2 and "a translation model; task=classification finetunes" in refused.stderr
