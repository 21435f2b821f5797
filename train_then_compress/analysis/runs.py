"""The runs of a study as they lie on the disk: read, put in order of size, judged, and what they lack in words."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from train_then_compress.analysis.frontier import CELL
from train_then_compress.analysis.measures import MEASURES
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.labelled import HubLabelled
from train_then_compress.config.model import ModelConfig, TransformerConfig
from train_then_compress.config.parallel import ParallelConfig
from train_then_compress.records import DENSE_STAGES, RunDirectory, read_json, read_rows

#: Groups of the config that can make two runs of one shape and budget differ.
_VARIANT_GROUPS = ("task", "data", "model", "optimizer", "runtime", "branch_from", "pretrain")
#: What training spends.
_UNITS = ("seconds", "steps", "tokens", "flops")


@dataclass(frozen=True)
class Run:
    """The files of one run. ``points`` holds, for each recipe, the last row that was written for it."""

    path: Path
    config: Config
    record: dict[str, Any]
    points: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]


def read_runs(directory: Path) -> tuple[list[Run], list[str]]:
    """Every readable run of a study, and a sentence on each that is not.

    Raises FileNotFoundError, in words, where there is no study or no run in it.
    """
    if not directory.is_dir():
        beside = sorted({path.parent.parent.name for path in directory.parent.glob("*/*/config.yaml")})
        known = f"studies in {directory.parent}: {', '.join(beside)}" if beside else f"{directory.parent} has no study"
        raise FileNotFoundError(f"{directory}: no such study; {known}")
    runs, missing = [], []
    for path in sorted(path for path in directory.iterdir() if path.is_dir()):
        if not (path / "config.yaml").is_file():
            if (path / "lock").exists():
                missing.append(f"{path.name}: started, nothing recorded yet")
            continue
        try:
            runs.append(_read_run(path))
        except (ConfigError, ValueError, OSError) as error:
            missing.append(f"{path.name}: cannot be read ({error})")
    if not runs and not missing:
        raise FileNotFoundError(f"{directory}: no run in it yet; a run is a directory with a config.yaml")
    return runs, missing


def _read_run(path: Path) -> Run:
    files = [file for stage in DENSE_STAGES for file in sorted(path.glob(f"stages/{stage}-*/record.json"))]
    records = [read_json(file) for file in files]
    points = {row["recipe"]: row for row in read_rows(path / "points.jsonl")}
    metrics = read_rows(RunDirectory(path).metrics)
    return Run(path, Config.load(path / "config.yaml"), records[-1] if records else {}, points, metrics)


def runs_frame(runs: list[Run]) -> pd.DataFrame:
    """One row per run in order of cell, size (depth x width², the blocks' parameters but for a factor), variant, seed.

    The columns are described in `train_then_compress.analysis.table.Study`.
    """
    variants = _variants([run.config for run in runs])
    frame = pd.DataFrame([_row(run, variant) for run, variant in zip(runs, variants, strict=True)])
    frame["size"] = frame["depth"] * frame["width"] ** 2
    frame = frame.sort_values([*CELL, "size", "depth", "variant", "seed"]).reset_index(drop=True)
    for split in ("validation", "test"):
        # A run that has no record yet is held against the baseline of its corpus's other runs.
        own = pd.to_numeric(frame[f"baseline_{split}"]).astype(float)
        same = [frame[key] for key in ("task", "corpus", "vocab_size")]
        frame[f"baseline_{split}"] = own.fillna(own.groupby(same).transform("first"))
    for column in ("validation_perplexity", "validation_accuracy", "validation_bleu"):
        frame[column] = pd.to_numeric(frame[column]).astype(float)
    is_mlm = frame["task"] == "mlm"
    frame["unigram_share"] = (frame["validation_perplexity"] / frame["baseline_validation"]).where(is_mlm)
    frame["learned"] = True
    for task, rows in frame.groupby("task"):
        measures = MEASURES[str(task)]
        reached = rows[f"validation_{measures.curve.column}"]
        threshold = measures.share * rows["baseline_validation"]
        # Where either is unknown there is nothing to hold against the run.
        unknown = reached.isna() | threshold.isna()
        frame.loc[rows.index, "learned"] = unknown | measures.curve.reaches(reached, threshold)
    return frame


def _row(run: Run, variant: str) -> dict[str, Any]:
    config, clock = run.config, run.record.get("clock", {})
    origin = run.record.get("origin") or {}
    finetuned = config.task.name == "classification"
    training = [row for row in run.metrics if row["stage"].startswith(DENSE_STAGES)]
    last: dict[str, Any] = next((row for row in reversed(training) if row["split"] == "validation"), {})
    validation = run.record.get("validation", last)
    corpus = run.record.get("corpus", {})
    baseline = corpus.get(MEASURES[config.task.name].recorded, {})
    budget = config.pretrain.budget if config.pretrain is not None else config.budget
    pretraining = origin.get("clock") or {} if finetuned else clock
    is_done = (run.path / "result.json").is_file()
    failure = {} if is_done else read_json(RunDirectory(run.path).failure) or {}
    return {
        "study": run.path.resolve().parent.name,
        "run": run.path.name,
        "task": config.task.name,
        "corpus": _corpus(config),
        "vocab_size": config.vocab_size,
        "depth": _depth(config.model),
        "width": config.model.width,
        "variant": variant,
        "seed": config.seed,
        "budget_kind": budget.kind,
        "budget": budget.value,
        **{f"train_{unit}": pretraining.get(unit) for unit in _UNITS},
        **{f"finetune_{unit}": clock.get(unit) if finetuned else None for unit in _UNITS},
        "pretrained_perplexity": (origin.get("validation") or {}).get("perplexity") if finetuned else None,
        "validation_perplexity": validation.get("perplexity"),
        "validation_accuracy": validation.get("accuracy"),
        "validation_bleu": validation.get("bleu"),
        "baseline_validation": baseline.get("valid"),
        "baseline_test": baseline.get("test"),
        "baseline_chrf": corpus.get("copy_chrf", {}).get("test"),
        "progress": 1.0 if run.record else max((row["progress"] for row in training), default=0.0),
        "absent": [recipe for recipe in config.parsed_recipes() if recipe not in run.points],
        "failure": failure.get("reason", ""),
    }


def _depth(model: ModelConfig) -> int:
    """Layers; a translator's are those of its deeper side."""
    return max(model.encoder_layers, model.decoder_layers) if isinstance(model, TransformerConfig) else model.depth


def _corpus(config: Config) -> str:
    """A Hugging Face dataset by its path, and its configuration where it is labelled; every other text by its name;
    parallel text with its languages."""
    if isinstance(config.data, ParallelConfig):
        return f"{getattr(config.data, 'path', config.data.name)}:{config.data.source}-{config.data.target}"
    if isinstance(config.data, HubLabelled):
        return config.data.path + (f":{config.data.subset}" if config.data.subset else "")
    return str(getattr(config.data, "path", config.data.name))


def _settings(config: Config) -> dict[str, Any]:
    """What can make two runs of one shape and budget differ, flat; a teacher by its run's name."""
    groups = {group: dataclasses.asdict(config)[group] for group in _VARIANT_GROUPS}
    _, at, milestone = Path(config.init_from or "").name.rpartition("@")
    settings = dict(_flatten(groups)) | {"milestone": milestone if at else None, "teacher": None}
    if config.distill is not None:
        teaching = dataclasses.asdict(config.distill)
        settings |= teaching | {"teacher": Path(teaching["teacher"]).name}
    if config.pretrain is not None:
        settings |= _flatten({"budget": dataclasses.asdict(config.budget)})
    return settings


def _variants(configs: list[Config]) -> list[str]:
    """For each run the settings in which runs of one shape and budget differ.

    A learning rate that goes with the shape is no variant.
    """
    flat = [_settings(config) for config in configs]
    seen: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for config, settings in zip(configs, flat, strict=True):
        budget = config.pretrain.budget if config.pretrain is not None else config.budget
        shape = (_depth(config.model), config.model.width)
        same = (config.task.name, _corpus(config), config.vocab_size, budget.kind, budget.value, *shape)
        for key, value in settings.items():
            seen[*same, key].add(repr(value))
    keys = sorted({key[-1] for key, values in seen.items() if len(values) > 1})
    last_parts = [key.rpartition(".")[2] for key in keys]
    names = {key: key if last_parts.count(last) > 1 else last for key, last in zip(keys, last_parts, strict=True)}
    return [", ".join(f"{name}={settings.get(key)}" for key, name in names.items()) for settings in flat]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def what_is_missing(runs: pd.DataFrame) -> list[str]:
    """A sentence on each run that is unfinished, has failed, or has learned too little to be drawn."""
    sentences = []
    for run in runs.to_dict("records"):
        said = []
        if run["failure"]:
            said.append(f"stopped at {run['progress']:.0%} of its budget: {run['failure']}")
        elif run["progress"] < 1:
            said.append(f"training stands at {run['progress']:.0%} of its budget")
        if run["absent"]:
            said.append(f"no point yet for {', '.join(run['absent'])}")
        if not run["learned"]:
            measures = MEASURES[run["task"]]
            value, baseline = run[f"validation_{measures.curve.column}"], run["baseline_validation"]
            said.append(f"left out of the figures: {measures.too_little} ({value:.4g} against {baseline:.4g})")
        if said:
            sentences.append(f"{run['run']}: {'; '.join(said)}")
    return sentences
