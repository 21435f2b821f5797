"""Weights & Biases, for those who want it. Nothing here ever stops a training: failures become a warning.

Offline (the default) a run's history is replayed from ``metrics.jsonl`` once it ends: nothing disturbs the training
clock, and a resumed run needs no care, although W&B cannot resume offline runs. ``runs/<study>/wandb/`` then holds one
run directory for each run, to look at with ``wandb leet runs/<study>/wandb`` (no account needed) or to upload with
``wandb sync``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import yaml

from train_then_compress.config import TrackerConfig
from train_then_compress.records import RunDirectory, digest, read_rows

logger = logging.getLogger(__name__)

#: What a stage has spent; each can be the x axis of its curves.
AXES = ("seconds", "flops", "tokens", "steps", "progress")


def replay(run_directory: Path, study: str, tracker_config: TrackerConfig, directory: Path) -> Path | None:
    """Write a run's whole history as one fresh offline run below ``directory``/wandb; returns that run's directory.

    Does nothing, and returns None, unless the tracker is ``wandb`` in mode ``offline``, and where it fails. An earlier
    offline run with the same id is deleted first: of two with one id, the later uploaded would overwrite the other.
    """
    if tracker_config.name != "wandb" or tracker_config.mode != "offline":
        return None
    with _warnings_only(f"W&B history of {run_directory.name}"):
        identity = stable_id(study, run_directory.name)
        _delete_offline(directory, identity)
        config = _read_config(run_directory)
        with _start(study, run_directory.name, _job_type(config), config, tracker_config, directory) as run:
            history = _History(run, _budget_kind(config))
            for row in read_rows(RunDirectory(run_directory).metrics):
                history.log(row)
            _log_results(run, run_directory)
        return Path(run.settings.sync_dir)
    return None


class LiveTracker:
    """Sends every metric row as it is written, in mode ``online``; otherwise does nothing.

    A context manager, and a listener of `MetricsLog`. A resumed run continues the W&B run with its stable id; rows
    that were sent before the interruption are not sent twice, since W&B keeps the first it gets for a step.
    """

    def __init__(self, run_directory: Path, study: str, tracker_config: TrackerConfig, directory: Path) -> None:
        self.run_directory = run_directory
        self.study = study
        self.tracker_config = tracker_config
        self.directory = directory
        self._run: Any = None
        self._history: _History | None = None

    def __enter__(self) -> LiveTracker:
        if self.tracker_config.name != "wandb" or self.tracker_config.mode != "online":
            return self
        with _warnings_only(f"W&B run of {self.run_directory.name}"):
            config = _read_config(self.run_directory)
            name = self.run_directory.name
            self._run = _start(
                self.study, name, _job_type(config), config, self.tracker_config, self.directory, resume="allow"
            )
            self._history = _History(self._run, _budget_kind(config))
            for row in read_rows(RunDirectory(self.run_directory).metrics):
                self._history.place(row)
        return self

    def __call__(self, row: dict[str, Any]) -> None:
        """Send a row; `MetricsLog` stops calling if this raises."""
        if self._history is not None:
            self._history.log(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is None:
            return
        with _warnings_only(f"W&B run of {self.run_directory.name}"):
            try:
                _log_results(self._run, self.run_directory)
            finally:
                self._run.finish(exit_code=0 if kind is None else 1)


def log_frontier(study_directory: Path, rows: list[dict[str, Any]], tracker_config: TrackerConfig) -> None:
    """Log the finished frontier as a table, in a run ``<study>-frontier`` of its own beside the study's runs."""
    if tracker_config.name != "wandb" or tracker_config.mode == "disabled":
        return
    study, name = study_directory.name, f"{study_directory.name}-frontier"
    with _warnings_only(f"W&B table {name}"):
        _delete_offline(study_directory, stable_id(study, name))
        with _start(study, name, "analysis", {}, tracker_config, study_directory) as run:
            _log_table(run, "frontier", rows)


def track_study(study_directory: Path, tracker_config: TrackerConfig) -> list[str]:
    """Replay every run of a study that has metrics, finished or not; returns the names of those replayed.

    Always offline, whatever the configured mode: ``wandb sync`` uploads what this writes.
    """
    offline = replace(tracker_config, name="wandb", mode="offline")
    directories = [path.parent for path in sorted(study_directory.glob("*/metrics.jsonl"))]
    return [path.name for path in directories if replay(path, study_directory.name, offline, study_directory)]


def stable_id(study: str, run_name: str) -> str:
    """The W&B id of a run: the same after every resume and replay (16 hexadecimal digits)."""
    return digest([study, run_name])[:16]


@contextmanager
def _warnings_only(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        logger.warning("%s: not written, W&B is missing (%s); install it with 'pip install wandb'", what, error)
    except Exception as error:
        logger.warning("%s: not written completely: %s: %s", what, type(error).__name__, error)


def _start(
    study: str, name: str, job_type: str, config: dict[str, Any], tracker: TrackerConfig, directory: Path,
    resume: Literal["allow"] | None = None,
) -> Any:  # fmt: skip
    import wandb

    # Asking for a key would hold up a sweep that nobody watches.
    if tracker.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no W&B account is logged in here: run 'wandb login', or use tracker.mode=offline")
    settings = wandb.Settings(
        silent=True, quiet=True, console="off", symlink=False, use_dot_wandb=False, init_timeout=30,
        # Only what this project writes: no code, host name, packages or load of the machine.
        save_code=False, disable_code=True, disable_git=True, host="", x_disable_stats=True, x_disable_meta=True,
        x_disable_machine_info=True, x_save_requirements=False,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    # 'create_new' shares no run with an earlier one of the same process, finished or not.
    return wandb.init(
        project=tracker.project, entity=tracker.entity, mode=tracker.mode, group=study, job_type=job_type, name=name,
        id=stable_id(study, name), config=config, dir=directory, resume=resume, reinit="create_new", settings=settings,
    )  # fmt: skip


def _delete_offline(directory: Path, identity: str) -> None:
    for earlier in (directory / "wandb").glob(f"offline-run-*-{identity}*"):
        shutil.rmtree(earlier)


class _History:
    """Places metric rows on W&B's own step, under the names ``<stage>/<split>/<metric>`` and ``<stage>/<axis>``.

    W&B wants one step that never falls: here the optimizer steps of all stages, one after the other. The train and
    validation rows of one optimizer step share it.
    """

    def __init__(self, run: Any, budget_kind: str) -> None:
        self._run = run
        self._budget_kind = budget_kind
        self._labels: dict[str, str] = {}
        self._stage: str | None = None
        self._before = self._step = 0

    def log(self, row: dict[str, Any]) -> None:
        """Send one row."""
        label, step = self.place(row)
        values = {}
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values[f"{label}/{key}" if key in AXES else f"{label}/{row['split']}/{key}"] = value
        self._run.log(values, step=step)

    def place(self, row: dict[str, Any]) -> tuple[str, int]:
        """The label of a row's stage, its axes defined, and the step that the row belongs to."""
        stage = row["stage"]
        if stage not in self._labels:
            self._labels[stage] = self._define(stage)
        if stage != self._stage:
            self._stage, self._before = stage, self._step
        self._step = max(self._step, self._before + int(row["steps"]))
        return self._labels[stage], self._step

    def _define(self, stage: str) -> str:
        """Name the curves of a stage and their axes. Two stages of one name and different settings stay apart."""
        label = stage.rpartition("-")[0] or stage
        if label in self._labels.values():
            label = stage
        for axis in AXES:
            self._run.define_metric(f"{label}/{axis}", hidden=True)
        # Recovery and the like have no budget of their own but a cap in steps.
        default = self._budget_kind if label == "pretrain" else "steps"
        for split in ("train", "validation"):
            self._run.define_metric(f"{label}/{split}/*", step_metric=f"{label}/{default}")
        return label


def _log_results(run: Any, run_directory: Path) -> None:
    """The end of a run: final validation perplexity, and each point in the summary and as a row of a table."""
    directory = RunDirectory(run_directory)
    final = [row["perplexity"] for row in read_rows(directory.metrics) if _is_dense_validation(row)]
    if final:
        run.summary["validation_perplexity"] = final[-1]
    points = list(directory.points().values())
    if points:
        summary = {f"points/{row['recipe']}/{key}": value for row in points for key, value in _scalars(row).items()}
        run.summary.update(summary)
        _log_table(run, "points", points)


def _is_dense_validation(row: dict[str, Any]) -> bool:
    return row["split"] == "validation" and row["stage"].startswith("pretrain-") and row.get("perplexity") is not None


def _log_table(run: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """Log the rows' scalars as a W&B table; columns in order of first appearance."""
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in _scalars(row)))
    data: list[Iterable[Any]] = [[_scalars(row).get(key) for key in columns] for row in rows]
    with _staged_in(run.settings.sync_dir):
        run.log({name: wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)})


@contextmanager
def _staged_in(directory: str) -> Iterator[None]:
    """Keep a table's file with its run until it is uploaded; W&B would put it in the home directory, for good."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = directory
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before


def _scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what W&B cannot show in a cell, such as the weight error of every layer."""
    return {key: value for key, value in row.items() if isinstance(value, str | int | float)}


def _read_config(run_directory: Path) -> dict[str, Any]:
    path = run_directory / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _job_type(config: dict[str, Any]) -> str:
    return str(config.get("task", {}).get("name", "run"))


def _budget_kind(config: dict[str, Any]) -> str:
    return str(config.get("budget", {}).get("kind", "seconds"))
