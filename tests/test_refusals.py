"""What `ttc` refuses, in words, before anything starts; and what it says of files that were damaged."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from train_then_compress.cost import machine

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.dpeth=3", "dpeth"),
        ("model.depth=99", "model.depth=99"),
        ("model.width=40", "model.width=40: must be a multiple of model.head_size=16"),
        ("+scale=cpu model.width=0", "model.width=0: must be greater than or equal to 2"),
        ("study=${nowhere}", "study: Interpolation key 'nowhere' not found"),
        ("data.train=nowhere.txt", "data.train"),
        ("recipes=[quant5]", "bits must be one of 8, 6, 4, 3, 2"),
        ("recipes=[squash4]", "unknown method 'squash'; known are "),
        ("budget.kind=minutes", "budget.kind='minutes'"),
        ("runtime.threads=999", "runtime.threads=999"),
        ("steps.prune.scope=model recipes=[prune15]", "steps.prune.scope='model'"),
        ("model.depth=48 model.width=16384", "training needs more than"),
        ("steps.squash.bits=4", "squash"),
        ("steps.quant.granularity=row recipes=[none]", "steps.quant.granularity='row'"),
        ("branch_from=runs/x@0.5", "only optimizer.schedule=wsd can branch"),
    ],
)
def test_bad_input_is_refused_in_words_before_anything_starts(
    tmp_path: Path, common: list[str], ttc_here: Command, override: str, words: str
) -> None:
    done = ttc_here("run", *common, *override.split(" "), cwd=tmp_path)
    assert done.returncode != 0 and words in done.stderr + done.stdout
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_mistake_in_the_last_cell_is_found_before_the_first_starts(
    tmp_path: Path, common: list[str], ttc: Command
) -> None:
    done = ttc("run", "-m", *common, "study=late", "model.width=32,40", cwd=tmp_path)
    assert done.returncode == 2 and "model.width=40" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_flags_may_stand_between_overrides_and_a_sweep_is_one_study(
    tmp_path: Path, common: list[str], ttc_here: Command
) -> None:
    done = ttc_here("run", *common, "-m", "study=one,two", cwd=tmp_path)
    assert done.returncode == 2 and "study=one,two: a sweep is one study; give one command for each" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["paths.runs", "paths.cache"])
def test_a_directory_that_cannot_be_made_is_named(
    tmp_path: Path, common: list[str], ttc_here: Command, key: str
) -> None:
    (tmp_path / "file").touch()
    done = ttc_here("run", *common, f"{key}=file/below", cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {key}={tmp_path / 'file/below'}: this directory cannot be made (Not a directory)" in done.stderr


def test_a_busy_machine_is_said_once_and_leaves_nothing(tmp_path: Path, common: list[str], ttc_here: Command) -> None:
    with machine.held("cpu", exclusive=True):
        done = ttc_here("run", "-m", *common, "budget=seconds", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("in use by another run (process") == 1
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_missing_gpu_is_said_without_a_traceback(tmp_path: Path, common: list[str], ttc: Command) -> None:
    done = ttc("run", *common, "runtime=gpu", "runtime.processes=1", "runtime.dtype=fp32", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: runtime.device=cuda: no GPU is usable here" in done.stderr


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, common: list[str], run_here: Callable[..., list[Path]], untimed: None
) -> Path:
    """A run of two steps."""
    directory = tmp_path_factory.mktemp("finished")
    (run,) = run_here(*common, "study=one", "budget.value=2", "optimizer.warmup=0", cwd=directory)
    return run


@pytest.mark.parametrize(
    "name, command",
    [
        ("stages/pretrain-*/model.safetensors", "run"),
        ("stages/pretrain-*/record.json", "run"),
        ("stages/pretrain-*/record.json", "export"),
        ("stages/pretrain-*/packed.safetensors", "export"),
        ("config.yaml", "export"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(
    finished: Path, common: list[str], ttc: Command, name: str, command: str
) -> None:
    (path,) = finished.glob(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if path.suffix != ".yaml" else b"study: [\n")
    try:
        again = ["run", *common, "study=one", "budget.value=2", "optimizer.warmup=0", "recipes=[none,quant4]"]
        done = ttc(*(again if command == "run" else ["export", str(finished), "--to", "safetensors"]),
                   cwd=finished.parents[2])  # fmt: skip
    finally:
        path.write_bytes(whole)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"error: {path} is damaged" in done.stderr and f"delete {path.parent}" in done.stderr


def test_a_damaged_corpus_is_named_with_the_way_out(tmp_path: Path, text_file: Path, ttc_here: Command) -> None:
    arguments = ["data", "prepare", "text_files", f"data.train={text_file}", "data.vocab_size=400", "paths.cache=cache"]
    assert ttc_here(*arguments, cwd=tmp_path).returncode == 0
    (record,) = tmp_path.glob("cache/prepared/*/record.json")
    record.write_text("{")
    for command in (arguments, ["data", "export", *arguments[2:], "--to", "fairseq", "--out", "out"]):
        done = ttc_here(*command, cwd=tmp_path)
        assert done.returncode == 2 and "record.json is damaged" in done.stderr and "delete" in done.stderr


def test_a_corpus_that_is_not_known_is_said_with_those_that_are(tmp_path: Path, ttc_here: Command) -> None:
    for command in (["prepare", "nowhere"], ["export", "nowhere", "--to", "fairseq", "--out", "out"]):
        done = ttc_here("data", *command, cwd=tmp_path)
        assert done.returncode == 2 and "error: data=nowhere: no such corpus; known are csv_files, " in done.stderr


def test_what_cannot_be_shown_is_an_error(finished: Path, ttc: Command) -> None:
    """A format that is not known, and figures of a model that has learned nothing."""
    refused = ttc("table", "one", "--format", "xml", cwd=finished.parents[2])
    assert refused.returncode == 2 and "xml: allowed are md, csv and json" in refused.stderr
    nothing = ttc("figures", "one", cwd=finished.parents[2])
    assert nothing.returncode == 2 and "nothing to draw: no run of this study has learned enough" in nothing.stderr


def test_a_study_without_runs_is_named(tmp_path: Path, ttc: Command) -> None:
    (tmp_path / "runs/empty").mkdir(parents=True)
    done = ttc("track", "empty", cwd=tmp_path)
    assert done.returncode == 2 and "runs/empty: no run with a history yet" in done.stderr
    for command in ("table", "figures"):
        done = ttc(command, "empty", cwd=tmp_path)
        assert done.returncode == 2 and "error: runs/empty: no run in it yet" in done.stderr
