"""Runs taught by another run (``distill.teacher``): trained, resumed, finetuned, told apart, and refused."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train_then_compress.analysis.table import load_study
from train_then_compress.cell import Cell, locate
from train_then_compress.config import Config, ConfigError
from train_then_compress.records import RunDirectory, read_json
from train_then_compress.run import work
from train_then_compress.training import interrupt

Ttc = Callable[..., subprocess.CompletedProcess[str]]
Values = dict[str, Any]


pytestmark = pytest.mark.usefixtures("untimed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taught")


@pytest.fixture(scope="module")
def text(text_file: Path, cache: Path, place: Path) -> Values:
    return {
        "study": "text", "model": {"depth": 1, "width": 32, "head_size": 16, "dropout": 0.1},
        "data": {"name": "text_files", "train": str(text_file), "vocab_size": 400, "sequence_length": 32},
        "budget": {"kind": "steps", "value": 20}, "optimizer": {"lr": 5e-3, "batch_size": 8},
        "evaluation": {"points": 1}, "runtime": {"dtype": "fp32", "threads": 1},
        "paths": {"runs": str(place / "runs"), "cache": str(cache)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def labelled(text: Values, labelled_file: Path) -> Values:
    pretrain = {key: text[key] for key in ("data", "budget", "optimizer")}
    data = {"name": "csv_files", "train": str(labelled_file), "sequence_length": 32}
    return text | {"study": "labels", "task": {"name": "classification"}, "pretrain": pretrain, "data": data}


LARGE = {"depth": 2, "width": 48, "head_size": 16}


def done(values: Values) -> Cell:
    cell = locate(Config.build(values))
    work(cell)
    return cell


@pytest.fixture(scope="module")
def teacher(text: Values) -> Cell:
    return done(text | {"model": LARGE})


@pytest.fixture(scope="module")
def classifier(labelled: Values) -> Cell:
    return done(labelled | {"model": LARGE})


def taught_by(teacher: Cell, **settings: Any) -> Values:
    return {"distill": {"teacher": str(teacher.directory.path), **settings}}


def weights_of(cell: Cell) -> dict[str, torch.Tensor]:
    return load_file(cell.directory.stage(cell.plan.dense) / "model.safetensors")


def record_of(cell: Cell) -> dict[str, Any]:
    record = cell.directory.stage_record(cell.plan.dense)
    assert record is not None
    return record


@pytest.mark.parametrize("hints", ["none", "hidden", "relations"])
def test_a_masked_lm_learns_from_a_larger_one(text: Values, teacher: Cell, hints: str) -> None:
    """What is stored has the student's parameters alone; the teacher's passes are paid for."""
    plain = done(text)
    taught = done(text | taught_by(teacher, hints=hints))
    assert taught.directory.path != plain.directory.path
    assert weights_of(taught).keys() == weights_of(plain).keys()
    assert record_of(taught)["clock"]["flops"] > 1.5 * record_of(plain)["clock"]["flops"]
    assert record_of(taught)["teacher"] == teacher.plan.dense.id and record_of(plain)["teacher"] is None


def test_interrupted_it_ends_in_the_same_weights(
    text: Values, teacher: Cell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = text | taught_by(teacher, hints="hidden")
    calm = done(taught | {"study": "calm"})
    calls = itertools.count(1)
    monkeypatch.setattr(interrupt, "requested", lambda: next(calls) == 8)
    with pytest.raises(interrupt.Interrupted, match="step 8"):
        done(taught | {"study": "stopped"})
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    stopped = weights_of(done(taught | {"study": "stopped"}))
    assert all(torch.equal(value, stopped[name]) for name, value in weights_of(calm).items())


def test_milestones_of_a_taught_run_are_the_students(text: Values, teacher: Cell, labelled: Values) -> None:
    """They can be compressed and finetuned; a run taught otherwise cannot branch from them."""
    wsd = text | {"optimizer": text["optimizer"] | {"schedule": "wsd"}, "checkpoint": {"keep_at": [0.5]}}
    trunk = done(wsd | taught_by(teacher, hints="hidden"))
    at = f"{trunk.directory.path}@0.5"
    own = {name: wsd[name] for name in ("data", "model", "budget", "optimizer")}
    milestone = done(text | own | {"init_from": at})
    assert weights_of(milestone).keys() == weights_of(trunk).keys()
    short = {"budget": {"kind": "steps", "value": 2}, "optimizer": {"warmup": 0.0}}
    finetuned = done(labelled | short | {"init_from": at})
    assert record_of(finetuned)["origin"]["milestone"] == 0.5
    branch = wsd | {"branch_from": at}
    same = done(branch | taught_by(teacher, hints="hidden", temperature=3.0))
    assert record_of(same)["clock"]["steps"] == 20
    with pytest.raises(ConfigError, match=r"branch_from=.*@0\.5: was taught by other hints"):
        done(branch | {"seed": 1})


def test_a_finetuned_model_teaches_a_classifier(labelled: Values, classifier: Cell) -> None:
    """Its own pretraining is not taught."""
    taught = done(labelled | taught_by(classifier, hints="relations", layer_map="last"))
    assert record_of(taught)["teacher"] == classifier.plan.dense.id
    assert taught.below is not None and record_of(taught.below)["teacher"] is None
    assert weights_of(taught)["projection.weight"].shape == (6, 32)


def test_the_teachers_weights_and_all_that_it_does_are_part_of_the_identity(text: Values, teacher: Cell) -> None:
    other = done(text | {"model": LARGE, "seed": 1})
    settings: list[Values] = [
        {}, taught_by(teacher), taught_by(other), taught_by(teacher, temperature=3), taught_by(teacher, alpha=0.3),
        taught_by(teacher, hints="hidden"), taught_by(teacher, hints="hidden", layer_map="last"),
    ]  # fmt: skip
    ids = [locate(Config.build(text | extra)).plan.dense.id for extra in settings]
    assert len(set(ids)) == len(ids)
    moved = teacher.directory.path.with_name("moved")
    shutil.copytree(teacher.directory.path, moved)
    again = locate(Config.build(text | {"distill": {"teacher": str(moved)}}))
    shutil.rmtree(moved)
    assert again.plan.dense.id == ids[1], "where the teacher lies does not matter"


def test_the_command_and_the_table(text: Values, teacher: Cell, place: Path, ttc: Ttc) -> None:
    groups = ("model", "optimizer", "evaluation", "runtime", "paths", "data", "budget")
    given = [f"{group}.{key}={value}" for group in groups for key, value in text[group].items() if key != "name"]
    arguments = ["study=text", "data=text_files", *given, "distill=relations"]
    relative = teacher.directory.path.relative_to(place)
    finished = ttc("run", *arguments, f"distill.teacher={relative}", cwd=place)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    variants = set(load_study(place / "runs" / "text").runs["variant"])
    assert any(f"teacher={teacher.directory.path.name}" in variant for variant in variants)
    refused = ttc("run", *arguments, "distill.teacher=nowhere", cwd=place)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "distill.teacher=nowhere: no finished model of task=mlm there" in refused.stderr


def test_a_teacher_that_does_not_fit_is_refused(
    text: Values, labelled: Values, teacher: Cell, classifier: Cell, tmp_path: Path
) -> None:
    def refused(values: Values, words: str) -> None:
        with pytest.raises(ConfigError) as error:
            locate(Config.build(values))
        assert str(error.value).startswith("distill.teacher=") and words in str(error.value)

    refused(text | {"distill": {}}, "the directory of a finished run is needed")
    refused(text | taught_by(classifier), "no finished model of task=mlm there")
    refused(labelled | taught_by(teacher), "no finished model of task=classification there")
    refused(text | {"data": text["data"] | {"vocab_size": 380}} | taught_by(teacher), "it has another tokenizer")
    longer = text | {"data": text["data"] | {"sequence_length": 48}}
    refused(longer | taught_by(teacher), "it has learned positions up to 32 only: data.sequence_length=48")
    rows = Path(labelled["data"]["train"]).read_text().replace("harbour\n", "port\n").replace("harbour\r\n", "port\r\n")
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(rows)
    data = labelled["data"] | {"train": str(renamed)}
    refused(labelled | {"data": data} | taught_by(classifier), "it predicts other labels (harbour, kitchen")
    refused(text | taught_by(teacher) | {"init_from": str(teacher.directory.path)}, "nothing is trained here")


def test_any_run_may_be_given_again(text: Values, teacher: Cell) -> None:
    """A taught run that stands is done, and its config can be read back."""
    cell = done(text | taught_by(teacher))
    again = locate(Config.load(cell.directory.path / "config.yaml"))
    assert again.done and again.directory == RunDirectory(cell.directory.path)
    assert read_json(cell.directory.path / "result.json")
