"""A cell of a sweep: its config, the data and weights it begins with, its plan and its directory. Knows no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_then_compress.config import (
    Config,
    LabelledConfig,
    Milestone,
    ParallelConfig,
    Pretraining,
    TransformerConfig,
    parse_milestone,
)
from train_then_compress.config.base import reject
from train_then_compress.cost import machine
from train_then_compress.data.examples import Labelled, prepare_labelled
from train_then_compress.data.pairs import Pairs, prepare_pairs
from train_then_compress.data.prepare import Prepared, Tokenized, prepare
from train_then_compress.records import Plan, RunDirectory, StageKey, digest, plan, read_json


@dataclass(frozen=True)
class Origin:
    """Weights of another run: a finished stage's or, with ``milestone``, those of a checkpoint it kept."""

    directory: RunDirectory
    stage: StageKey
    milestone: Milestone | None = None

    @property
    def id(self) -> str:
        """Identifies the weights."""
        return self.stage.id if self.milestone is None else digest([self.stage.id, self.milestone])

    @property
    def weights(self) -> Path:
        """The finished stage's model.safetensors."""
        return self.directory.stage(self.stage) / "model.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the model was trained with."""
        return self.directory.stage(self.stage) / "tokenizer.json"

    @property
    def config(self) -> Config:
        """The config of the run that the weights are from."""
        return Config.load(self.directory.path / "config.yaml")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``below`` is the run that makes the model to finetune, if this run is to make it;
    ``teacher`` the model that teaches it."""

    config: Config
    data: Prepared | Labelled | Pairs
    plan: Plan
    directory: RunDirectory
    origin: Origin | None = None
    below: Cell | None = None
    teacher: Origin | None = None

    @property
    def done(self) -> bool:
        """Whether every recipe asked for stands."""
        return self.directory.is_done(self.plan)


def locate(config: Config, known: dict[str, Prepared | Pairs] | None = None) -> Cell:
    """Prepare the data of a resolved config and name its stages and directory.

    ``known`` remembers the texts that the cells of a sweep share. Raises `ConfigError` and `CorpusError` for data that
    cannot be had.
    """
    known = {} if known is None else known
    pretraining = config.pretraining()
    below = locate(pretraining, known) if pretraining is not None else None
    cache = Path(config.paths.cache)
    origin = None
    if below is not None:
        assert isinstance(below.data, Prepared)
        origin, tokenizer = Origin(below.directory, below.plan.dense), below.data.tokenizer
    elif config.init_from is not None:
        origin = find_origin(config.init_from)
        tokenizer = origin.tokenizer
        if not tokenizer.is_file():
            raise reject("init_from", config.init_from, "it keeps no tokenizer.json: train it again with this version")
    data: Prepared | Labelled | Pairs
    if isinstance(config.data, LabelledConfig):
        data = prepare_labelled(config.data, tokenizer, cache)
    elif (text := repr(config.data)) in known:
        data = known[text]
    elif isinstance(config.data, ParallelConfig):
        data = known[text] = prepare_pairs(config.data, cache)
    else:
        data = known[text] = prepare(config.data, cache)
    teacher = None
    if config.distill is not None:
        teacher = find_teacher(config)
        _check_teacher(config, teacher, data)
    ids = (origin.id if origin else None, teacher.id if teacher else None)
    planned = plan(config, data.id, machine.identity(), *ids)
    directory = RunDirectory(Path(config.paths.runs) / config.study / planned.run_name)
    return Cell(config, data, planned, directory, origin, below, teacher)


def split_origin(init_from: str) -> tuple[str, Milestone | None]:
    """The run's directory and the milestone, if one is named; a directory's own name may have an ``@``."""
    is_plain = "@" not in init_from or Path(init_from).is_dir()
    return (init_from, None) if is_plain else parse_milestone("init_from", init_from)


def find_origin(init_from: str) -> Origin:
    """The weights that ``init_from`` names; raises `ConfigError` where no finished pretraining stands there."""
    directory, milestone = split_origin(init_from)
    records = [read_json(path) for path in sorted(Path(directory).glob("stages/pretrain-*/record.json"))]
    if not records:
        raise reject("init_from", init_from, "no finished pretraining there; expected a run's directory, "
                     "e.g. runs/depth/mlm-d4-w64-seconds300-s0-1a2b3c4d")  # fmt: skip
    return Origin(RunDirectory(Path(directory)), StageKey("pretrain", records[-1]["id"]), milestone)


def find_teacher(config: Config) -> Origin:
    """The dense model that ``distill.teacher`` names; raises `ConfigError` where none of this task stands there."""
    assert config.distill is not None and config.distill.teacher is not None
    name = config.distill.teacher
    directory = RunDirectory(Path(name))
    stages = ("finetune",) if config.task.name == "classification" else ("pretrain", "milestone")
    found = [path for stage in stages for path in sorted(directory.path.glob(f"stages/{stage}-*/record.json"))]
    if not found:
        raise reject("distill.teacher", name, f"no finished model of task={config.task.name} there; expected a run's "
                     "directory, e.g. runs/depth/mlm-d4-w64-seconds300-s0-1a2b3c4d")  # fmt: skip
    record = read_json(found[-1])
    teacher = Origin(directory, StageKey(record["stage"], record["id"]))
    if not teacher.tokenizer.is_file():
        raise reject("distill.teacher", name, "it keeps no tokenizer.json: train it again with this version")
    return teacher


def _check_teacher(config: Config, teacher: Origin, data: Tokenized) -> None:
    """Raise `ConfigError` for a teacher that reads or predicts something else: other tokens or labels, less text."""
    assert config.distill is not None
    name = config.distill.teacher
    if teacher.tokenizer.read_bytes() != data.tokenizer.read_bytes():
        raise reject("distill.teacher", name, "it has another tokenizer: teacher and student must be pretrained on the "
                     "same text with the same data.vocab_size")  # fmt: skip
    labels = (teacher.directory.stage_record(teacher.stage) or {})["corpus"].get("labels")
    if isinstance(data, Labelled) and labels != data.labels:
        raise reject("distill.teacher", name, f"it predicts other labels ({', '.join(labels)}) than data="
                     f"{config.data.name} has")  # fmt: skip
    longest = teacher.config.longest
    if longest is None or isinstance(config.data, ParallelConfig):
        return
    if config.data.sequence_length > longest:
        raise reject("distill.teacher", name, f"it has learned positions up to {longest} only: data.sequence_length="
                     f"{config.data.sequence_length} is too long for it")  # fmt: skip


def adopt(config: Config) -> Config:
    """The config with what ``init_from`` decides: the model, and how it was pretrained.

    Raises `ConfigError` for another depth or width than found there, and for an imported model that is not finetuned.
    """
    if config.init_from is None:
        return config
    origin = find_origin(config.init_from)
    theirs = origin.config
    config = config.changed(init_from=str(Path(config.init_from).absolute()))
    for key in ("depth", "width"):
        asked, found = getattr(config.model, key), getattr(theirs.model, key)
        if asked not in (found, getattr(type(config.model)(), key)):
            raise reject(f"model.{key}", asked, f"init_from={config.init_from} has {found}")
    model = dataclasses.replace(theirs.model, impl=config.model.impl)  # the weights do not depend on it
    if config.task.name != "classification":
        if "id" not in (origin.directory.stage_record(origin.stage) or {})["corpus"]:
            raise reject("init_from", config.init_from, "an imported model, whose own text is not known; it can be "
                         "finetuned: task=classification")  # fmt: skip
        what: dict[str, Any] = {name: getattr(theirs, name) for name in ("task", "data", "budget", "optimizer", "seed")}
        return config.changed(**what | {"model": model})
    if isinstance(theirs.model, TransformerConfig):
        raise reject("init_from", config.init_from, "a translation model; task=classification finetunes a masked LM")
    made = Pretraining(**{name: getattr(theirs, name) for name in ("seed", "task", "data", "budget", "optimizer")})
    return config.changed(model=model, pretrain=made)
