"""Run directories, the identity of stages, and result rows. Knows no torch.

runs/<study>/<run>/config.yaml  metrics.jsonl  points.jsonl  result.json  checkpoint/
                   stages/<name>-<hash8>/{model.safetensors, packed.safetensors, record.json}
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train_then_compress.config import BATCH_FIELDS, Config, Step, parse_milestone

#: The version of a kind of stage (``pretrain``, ``quant``, ..) or of one task's dense stage, 1 where it is not named:
#: raise it when a change of the code makes earlier stages worth doing again.
SCHEMA: dict[str, int] = {"pretrain": 2, "pretrain translation": 3}

#: The stages that give a run its dense model: trained, finetuned, or taken from a milestone of another run.
DENSE_STAGES = ("pretrain", "finetune", "milestone")


class Busy(RuntimeError):
    """Another process works on the same run directory, or on the same cores."""


class Damaged(ValueError):
    """A file of a finished stage cannot be read; the message names it and the directory to delete."""

    def __init__(self, path: Path, reason: object):
        super().__init__(f"{path} is damaged ({reason}); delete {path.parent} and give the same command again")


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def what(config: Any) -> dict[str, Any]:
    """A config dataclass as a dictionary without the fields that have their default value.

    A field added later with a default leaves every earlier identity as it was.
    """
    kept: dict[str, Any] = {"is": type(config).__name__}
    for name, field in config.__pydantic_fields__.items():
        value = getattr(config, name)
        if value != field.get_default(call_default_factory=True):
            kept[name] = what(value) if dataclasses.is_dataclass(value) else value
    return kept


@dataclass(frozen=True)
class StageKey:
    """A stage's name and identity; ``step`` and ``parent`` are set for compression stages."""

    name: str
    id: str
    step: Step | None = None
    parent: StageKey | None = None

    @property
    def directory(self) -> str:
        """``<name>-<hash8>``."""
        return f"{self.name}-{self.id[:8]}"


@dataclass(frozen=True)
class Plan:
    """What a config asks for: the stage of the dense model, and for each recipe its chain of stages and its point."""

    run_name: str
    dense: StageKey
    recipes: dict[str, list[StageKey]]
    points: dict[str, str]


def plan(
    config: Config, data_id: str, machine: dict[str, Any], origin_id: str | None = None, teacher_id: str | None = None
) -> Plan:
    """Name every stage of a run by the hash of its parent, its own settings and its schema version.

    ``data_id`` is the hash of the prepared corpus, ``machine`` what identifies the hardware: it counts, with the
    runtime settings, only where wall-clock seconds are the budget. ``origin_id`` identifies the weights that the run
    begins with, if they are another run's; ``teacher_id`` those that teach it.
    """
    batch_settings = {key: value for key, value in what(config.data).items() if key in BATCH_FIELDS}
    own: dict[str, Any] = {
        "task": what(config.task), "data": batch_settings, "model": what(config.model), "budget": what(config.budget),
        "optimizer": what(config.optimizer), "seed": config.seed, "dtype": config.runtime.dtype,
        "branch_from": branch_identity(config.branch_from),
    }  # fmt: skip
    if config.distill is not None:
        own["distill"] = what(config.distill) | {"teacher": teacher_id}
    if config.budget.kind == "seconds":
        own |= {"runtime": what(config.runtime), "machine": machine}
    parents = [data_id] if origin_id is None else [origin_id, data_id]
    name = "finetune" if config.task.name == "classification" else "pretrain" if origin_id is None else "milestone"
    version = SCHEMA.get(f"{name} {config.task.name}", SCHEMA.get(name, 1))
    dense = StageKey(name, digest([*parents, own, version]))
    recipes = {recipe: _chain(dense, steps, config) for recipe, steps in config.parsed_recipes().items()}
    tested = [config.evaluation.test_sequences, *_decoding(config, config.evaluation.beam)]
    points = {
        recipe: digest([(chain or [dense])[-1].id, *tested, SCHEMA.get("point", 1)])
        for recipe, chain in recipes.items()
    }
    return Plan(run_name(config, dense.id), dense, recipes, points)


def _decoding(config: Config, beam: int) -> list[Any]:
    """What BLEU depends on beside the model and the sentences; nothing for other tasks."""
    evaluation = config.evaluation
    if config.task.name != "translation":
        return []
    return [beam, evaluation.length_penalty, evaluation.max_ratio, evaluation.max_extra]


def _chain(parent: StageKey, steps: list[Step], config: Config) -> list[StageKey]:
    chain = []
    validated: dict[str, Any] = {"validation_sequences": config.evaluation.validation_sequences}
    if decoding := _decoding(config, config.evaluation.validation_beam):
        validated["bleu"] = [config.evaluation.bleu_sentences, *decoding]
    for step in steps:
        for strength in step.config.increments(step.strength):
            part = dataclasses.replace(step, strength=strength)
            own = {"method": step.method, "strength": strength, "settings": what(step.config), **validated}
            parent = StageKey(part.name, digest([parent.id, own, SCHEMA.get(step.method, 1)]), part, parent)
            chain.append(parent)
    return chain


def branch_identity(branch_from: str | None) -> list[Any] | None:
    """The pretraining stage and the progress that a branch starts from."""
    if branch_from is None:
        return None
    directory, progress = parse_milestone("branch_from", branch_from)
    stages = sorted(Path(directory).glob("checkpoint/pretrain-*"))
    return [stages[0].name if stages else directory, progress]


def run_name(config: Config, identity: str) -> str:
    """One fixed form for each task, whatever else is swept: ``mlm-d6-w256-seconds600-s0-<hash8>``.

    A milestone's run says so (``mlm-d6-w256-seconds600@0.5-..``); a finetuning run names its corpus
    (``rotten_tomatoes-d6-w256-epochs10-..``); translation is ``mt``, and where the decoder's depth is not the encoder's
    it follows (``mt-d6.2-w256-..``).
    """
    value = f"{config.budget.value:g}".replace("+", "")
    finetuned = config.task.name == "classification"
    task = {"classification": config.data.name, "translation": "mt"}.get(config.task.name, config.task.name)
    _, at, name = ("", "", "") if finetuned else Path(config.init_from or "").name.rpartition("@")
    milestone = f"@{name}" if at else ""
    shape = f"d{config.model.depth_name}-w{config.model.width}"
    return f"{task}-{shape}-{config.budget.kind}{value}{milestone}-s{config.seed}-{identity[:8]}"


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Metric rows, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def failure(self) -> Path:
        """Why the last attempt ended, if its training diverged."""
        return self.path / "failure.json"

    def stage(self, key: StageKey) -> Path:
        """The directory of a stage."""
        return self.path / "stages" / key.directory

    def checkpoints(self, key: StageKey) -> Path:
        """The directory of a stage's checkpoints."""
        return self.path / "checkpoint" / key.directory

    def stage_record(self, key: StageKey) -> dict[str, Any] | None:
        """The record that says a stage is done, or None."""
        record: dict[str, Any] | None = read_json(self.stage(key) / "record.json")
        return record

    def points(self) -> dict[str, dict[str, Any]]:
        """Result rows by point id; of rows with one id the last counts."""
        return {row["point"]: row for row in read_rows(self.path / "points.jsonl")}

    def is_done(self, planned: Plan) -> bool:
        """Whether the run was finished and the last row of every recipe asked for is the one that the plan means."""
        latest = {row["recipe"]: row["point"] for row in read_rows(self.path / "points.jsonl")}
        asked = all(latest.get(recipe) == point for recipe, point in planned.points.items())
        return asked and (self.path / "result.json").is_file()

    def write_config(self, config: Config) -> None:
        """Keep the whole resolved config beside the run."""
        atomic_write(self.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory; raises `Busy` where another process does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Busy(f"{self.path} is being worked on by another process; wait for it or stop it") from None
            yield


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value, or None where there is no file; raises `Damaged`."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise Damaged(path, error) from None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON and push it to the disk; a line torn by a crash is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write((("\n" if torn else "") + json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a line torn by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def rewrite_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file, atomically."""
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
