"""One tidy row per point of a study, and what is missing in it, in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from train_then_compress.analysis.frontier import CELL, SERIES, mean_over_seeds, study_frontier
from train_then_compress.analysis.measures import MEASURES
from train_then_compress.analysis.runs import Run, read_runs, runs_frame, what_is_missing

#: Every column of the table, with its unit and convention. Text, unless a unit or a count is named.
COLUMNS: dict[str, str] = {
    "study": "the sweep: the directory's name",
    "run": "the run: its directory's name",
    "task": "the task: mlm, classification (a finetuned model) or translation",
    "corpus": "the text, by name (a Hugging Face dataset by its path), parallel text with its languages",
    "vocab_size": "tokens in the vocabulary asked for, special tokens included; perplexities compare only where equal",
    "depth": "layers (translation: of the encoder and of the decoder, of the deeper where they differ)",
    "width": "units of the residual stream (hidden size)",
    "variant": "settings that differ between runs of one shape and budget, e.g. lr=0.003; empty where only seeds do",
    "seed": "seed of initialization, order of batches and masks (classification: of the head and of finetuning)",
    "budget_kind": "what training (classification: pretraining) may spend: seconds, flops, tokens or steps",
    "budget": "how much of it; seconds are training-step time",
    "recipe": "compression steps joined by +; none is the dense model; unigram is the unigram model of the training "
    "text, smoothed as the corpus records it, majority the most frequent label, copy the source as its translation: "
    "for comparison (one row per corpus)",
    "test_loss": "nats per masked token (15 % masked), per example or per target token (</s> counted), test split",
    "test_perplexity": "exp(test_loss) of masked or target tokens",
    "test_accuracy": "share of masked tokens, or of labels, predicted exactly, in [0, 1], test split",
    "test_bleu": "sacreBLEU's BLEU of the test split translated by beam search (evaluation.beam), 0 to 100",
    "test_bleu_low": "lower end of its 95 % interval (bootstrap over sentences)",
    "test_bleu_high": "upper end",
    "test_chrf": "sacreBLEU's chrF of the same translations, 0 to 100",
    "test_bleu_sentences": "number of test sentences that were translated",
    "bleu_signature": "how sacreBLEU computed BLEU",
    "chrf_signature": "how sacreBLEU computed chrF",
    "bytes": "size of the packed file as it lies on disk, header included",
    "compression_ratio": "bytes_bf16 / bytes",
    "nonzero": "parameters that are not zero, tied embeddings counted once",
    "nonzero_without_embeddings": "the same without token and position embeddings",
    "frontier": "true where no other point of the same task, corpus, vocabulary and budget is at most as large (bytes) "
    "and at least as good (test_perplexity; classification: test_accuracy; translation: test_bleu) and better in one "
    "of them, both as means over seeds; never a ruined point, nor one of a run that has learned too little for the "
    "figures",
    "ruined": "true where the point is no better than the unigram model, the most frequent label or the copied source",
    "parameters": "all parameters, tied embeddings counted once",
    "parameters_without_embeddings": "the same without token and position embeddings",
    "bytes_bf16": "size of the dense model's file in bf16",
    "bytes_fp32": "size of the dense model's file in fp32",
    "flops_per_token": "FLOPs of a forward pass per token, zeros counted (dense); translation: of a test pair of mean "
    "length, as in training, per target token",
    "flops_per_token_nonzero": "the same with multiplications by zero weights left out; no speed-up follows from it",
    "latency_ms": "milliseconds per forward pass of one sequence, median, on engine with threads; translation: per "
    "test sentence translated alone by beam search (mean of 8 sentences)",
    "latency_iqr_ms": "interquartile range of that latency, milliseconds",
    "example_latency_ms": "milliseconds per test example alone (batch 1, no padding), mean, early exits taken "
    "(classification only)",
    "throughput": "tokens per second, batches of 16 sequences; translation: target tokens per second, 32 test "
    "sentences in a batch, greedy",
    "throughput_beam": "target tokens per second of the same by beam search (evaluation.beam; translation only)",
    "average_depth": "layers that a test example passes before it exits, mean (early exits only, whose flops_per_token "
    "and latency_ms are those of all layers)",
    "engine": "what ran the model while latency and throughput were taken",
    "threads": "CPU threads meanwhile",
    "weight_error": "relative Frobenius distance of all compressed matrices from the dense ones",
    "weight_errors": "the same for each layer (JSON object)",
    "compress_seconds": "training-step and quantizer time of the whole recipe, seconds",
    "compress_steps": "optimizer steps of recovery training, whole recipe",
    "compress_tokens": "tokens seen in recovery training, whole recipe",
    "compress_flops": "FLOPs of recovery training and of decoding targets to learn (seqdistill), whole recipe",
    "compress_calibration_tokens": "tokens that calibration looked at, whole recipe",
    "train_seconds": "training-step time spent by pretraining, seconds",
    "train_steps": "optimizer steps of pretraining",
    "train_tokens": "tokens seen in pretraining",
    "train_flops": "FLOPs of pretraining",
    "finetune_seconds": "training-step time spent by finetuning, seconds",
    "finetune_steps": "optimizer steps of finetuning",
    "finetune_tokens": "tokens seen in finetuning",
    "finetune_flops": "FLOPs of finetuning",
    "pretrained_perplexity": "validation perplexity of the finished masked LM whose weights (or those of one of whose "
    "milestones) were finetuned",
    "validation_perplexity": "of the dense model when training ended (unigram row: of the unigram model)",
    "validation_accuracy": "accuracy of the dense model when training ended, in [0, 1] (masked tokens or labels)",
    "validation_bleu": "BLEU of the dense model when training ended, on the first evaluation.bleu_sentences sentences, "
    "by evaluation.validation_beam (greedy by default)",
    "unigram_share": "validation_perplexity / the unigram model's; at 0.5 or more the figures leave the run out",
    "point": "identity of the point (hash)",
    "stage": "directory of the recipe's last stage",
}  # fmt: skip

_TEXT = [
    "study", "run", "task", "corpus", "variant", "budget_kind", "recipe", "bleu_signature", "chrf_signature", "engine",
    "weight_errors", "point", "stage",
]  # fmt: skip
_INTEGERS = [
    "vocab_size", "depth", "width", "seed", "bytes", "nonzero", "nonzero_without_embeddings", "parameters",
    "parameters_without_embeddings", "bytes_bf16", "bytes_fp32", "threads", "compress_steps", "compress_tokens",
    "compress_calibration_tokens", "test_bleu_sentences",
    "train_steps", "train_tokens", "finetune_steps", "finetune_tokens",
]  # fmt: skip

#: Interquartile ranges above this share of the median are said, of so many points by name.
_UNSTEADY, _NAMED = 0.5, 3


@dataclass(frozen=True)
class Study:
    """What a study's records say.

    ``points``: one row per point, the columns of `COLUMNS`, models by size and recipes from light to strong.
    ``metrics``: one row per line of the runs' metrics.jsonl, with ``run`` (``loss`` in nats per masked token).
    ``runs``: one row per run in order of size, its settings and results named as in `COLUMNS`, with ``progress``
    (share of the budget spent), ``learned``, ``failure`` (reason, or empty), ``absent`` (recipes without a point),
    ``baseline_validation`` and ``baseline_test`` (perplexity of the unigram model, accuracy of the most frequent
    label, BLEU of the copied source; its chrF is ``baseline_chrf``). ``missing`` and ``unsteady``: sentences on
    what is unfinished, failed or unreadable, and on latencies taken on a busy machine.
    """

    directory: Path
    runs: pd.DataFrame
    points: pd.DataFrame
    metrics: pd.DataFrame
    missing: list[str]
    unsteady: list[str]


def load_study(directory: Path) -> Study:
    """Read every run of a study; what is unfinished, failed or unreadable is said in ``missing``, the rest is kept.

    Raises FileNotFoundError, in words, where there is no study or no run in it.
    """
    read, unreadable = read_runs(directory)
    metrics = pd.DataFrame.from_records([{"run": run.path.name, **row} for run in read for row in run.metrics])
    if not read:
        return Study(directory, pd.DataFrame(), _typed(pd.DataFrame()), metrics, unreadable, [])
    runs = runs_frame(read)
    points = _points(runs, read)
    return Study(directory, runs, points, metrics, what_is_missing(runs) + unreadable, _unsteady(points))


def _unsteady(points: pd.DataFrame) -> list[str]:
    """A sentence on latencies that were taken on a busy machine, as their spread shows."""
    found = points[points["latency_iqr_ms"] > _UNSTEADY * points["latency_ms"]]
    names = [f"{row['run']}:{row['recipe']}" for row in found.to_dict("records")]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    said = f"{', '.join(names[:_NAMED])}{more}: the latency varied by more than half of its median (latency_iqr_ms)"
    return [f"{said}; where the machine was busy it means little"] if names else []


def _points(runs: pd.DataFrame, read: list[Run]) -> pd.DataFrame:
    points_of = {run.path.name: run.points for run in read}
    rows: list[dict[Any, Any]] = _baseline_rows(runs)
    for run in runs.to_dict("records"):
        rows += [run | row for row in sorted(points_of[run["run"]].values(), key=_from_light_to_strong)]
    frame = _typed(pd.DataFrame(rows))
    frame["compression_ratio"] = frame["bytes_bf16"].astype(float) / frame["bytes"].astype(float)
    baseline = pd.Series([row["baseline_test"] for row in rows], index=frame.index, dtype=float)
    learned = pd.Series([row.get("learned", False) for row in rows], index=frame.index, dtype=bool)
    for task, points in frame.groupby("task"):
        measure = MEASURES[str(task)].points[0]
        values, reference = points[measure.column].astype(float), baseline[points.index]
        ruined = values.notna() & reference.notna() & ~measure.reaches(values, reference)
        frame.loc[points.index, "ruined"] = ruined
        # Without this the frontier would always begin with the smallest file, however ruined its model.
        sound = points[~ruined & learned[points.index]]
        best = study_frontier(sound, "bytes", measure.column, measure.higher_is_better)
        frame.loc[best.index, "frontier"] = best
    return frame


def _baseline_rows(runs: pd.DataFrame) -> list[dict[Any, Any]]:
    known = runs.dropna(subset=["baseline_test"]).drop_duplicates(["task", "corpus", "vocab_size", "baseline_test"])
    rows = []
    for run in known.to_dict("records"):
        row = {key: run[key] for key in ("study", "task", "corpus", "vocab_size", "baseline_test")}
        measures, value = MEASURES[run["task"]], run["baseline_test"]
        row |= {"recipe": measures.baseline, measures.points[0].column: value,
                f"validation_{measures.curve.column}": run["baseline_validation"]}  # fmt: skip
        if run["task"] == "mlm":
            row |= {"test_loss": math.log(value), "unigram_share": 1.0}
        if run["task"] == "translation":
            row["test_chrf"] = run["baseline_chrf"]
        rows.append(row)
    return rows


def recipe_family(recipe: str) -> str:
    """A recipe without its strengths: ``prune+quant`` for ``prune60+quant4``, ``dense`` for ``none``."""
    return "dense" if recipe == "none" else "".join(character for character in recipe if not character.isdigit())


def family_order(family: str) -> tuple[bool, int, str]:
    """Sorts families: dense, single steps by name, combinations."""
    return family != "dense", family.count("+"), family


def _from_light_to_strong(point: dict[str, Any]) -> tuple[Any, ...]:
    return *family_order(recipe_family(point["recipe"])), -(point.get("bytes") or 0), point["recipe"]


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """All columns of `COLUMNS`, in order: text, nullable integers, booleans, and floats for the rest."""
    frame = frame.reindex(columns=list(COLUMNS))
    for column in COLUMNS:
        if column in _TEXT:
            frame[column] = frame[column].astype(object).where(frame[column].notna(), "")
        elif column in ("frontier", "ruined"):
            frame[column] = False
        else:
            frame[column] = pd.to_numeric(frame[column]).astype("Int64" if column in _INTEGERS else float)
    return frame


def render(frame: pd.DataFrame, format: str) -> str:
    """The table as ``md`` (a readable choice of columns, rounded), ``csv`` or ``json`` (every column, exact)."""
    if format == "md":
        return _markdown(frame)
    if format == "csv":
        if "weight_errors" in frame:
            errors = frame["weight_errors"].map(lambda value: json.dumps(value) if value else "")
            frame = frame.assign(weight_errors=errors)
        return frame.to_csv(index=False, lineterminator="\n")
    if format == "json":
        rows = [{key: _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
        return json.dumps(rows, indent=2) + "\n"
    raise ValueError(f"format={format!r}: allowed are md, csv and json")


def _plain(value: Any) -> Any:
    """The value as JSON has it: null for what is unknown or not finite."""
    if isinstance(value, dict | str | bool):
        return value
    if pd.isna(value) or math.isinf(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _digits(digits: int, scale: float = 1.0) -> Callable[[Any], str]:
    """Writes value / scale with so many significant digits, thousands separated, without an exponent."""

    def write(value: Any) -> str:
        scaled = value / scale
        places = digits - 1 - math.floor(math.log10(abs(scaled))) if scaled and math.isfinite(scaled) else 0
        return f"{scaled:,.{max(0, places)}f}"

    return write


#: The columns of the Markdown table: heading, and how a value is written.
_MARKDOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "task": ("task", str),
    "corpus": ("corpus", str),
    "vocab_size": ("vocabulary", str),
    "budget_kind": ("budget in", str),
    "budget": ("budget", "{:g}".format),
    "depth": ("depth", str),
    "width": ("width", str),
    "variant": ("variant", str),
    "seed": ("seed", str),
    "seeds": ("seeds", str),
    "recipe": ("recipe", str),
    "test_perplexity": ("test perplexity", _digits(4)),
    "test_loss": ("test loss", _digits(3)),
    "test_accuracy": ("test accuracy (%)", _digits(3, 0.01)),
    "test_bleu": ("test BLEU", _digits(3)),
    "test_chrf": ("test chrF", _digits(3)),
    "bytes": ("size (MB)", _digits(3, 1e6)),
    "compression_ratio": ("ratio to bf16", _digits(3)),
    "nonzero": ("non-zero (M)", _digits(3, 1e6)),
    "latency_ms": ("latency (ms)", _digits(3)),
    "throughput": ("tokens/s", _digits(3)),
    "throughput_beam": ("tokens/s by beam search", _digits(3)),
    "weight_error": ("weight error", "{:.3f}".format),
    "compress_seconds": ("compression (s)", _digits(3)),
    "train_seconds": ("training (s)", _digits(3)),
    "validation_perplexity": ("dense validation perplexity", _digits(4)),
    "validation_accuracy": ("dense validation accuracy (%)", _digits(3, 0.01)),
    "validation_bleu": ("dense validation BLEU", _digits(3)),
    "frontier": ("frontier", lambda value: "yes" if value else ""),
}
_ON_ENGINE = "latency_ms_"
_SHOWN_IF_VARIED = [*CELL, "variant", "seed"]
_SHOWN_IF_KNOWN = ["throughput_beam"]
#: Shown for the tasks that are judged by them.
_QUALITY = [
    "test_perplexity", "test_loss", "test_accuracy", "test_bleu", "test_chrf", "validation_perplexity",
    "validation_accuracy", "validation_bleu",
]  # fmt: skip


def with_engines(points: pd.DataFrame, measured: dict[str, Any]) -> pd.DataFrame:
    """The points with what ``ttc engines`` measured of them: a column ``latency_ms_<engine>`` for each engine."""
    points, names = points.copy(), points["run"] + ":" + points["recipe"]
    for row in measured["rows"]:
        if row["unavailable"] is None:
            points.loc[names == row["point"], f"{_ON_ENGINE}{row['engine']}"] = row["latency_ms"]
    return points


def averaged(points: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row per model and recipe, with ``seeds``, their number, and for each column its smallest
    and largest value (``_low``, ``_high``)."""
    left_out = {*_TEXT, *CELL, *SERIES, "seed"}
    return mean_over_seeds(points, [name for name in _shown(points) if name not in left_out])


def _shown(frame: pd.DataFrame) -> dict[str, tuple[str, Callable[[Any], str]]]:
    """`_MARKDOWN` as far as the frame has it, and its engines before what compression cost."""
    names = [str(name) for name in frame if not str(name).endswith(("_low", "_high"))]
    engines = {name: (f"{name.removeprefix(_ON_ENGINE)} latency (ms)", _digits(3))
               for name in names if name.startswith(_ON_ENGINE)}  # fmt: skip
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {}
    for name, column in _MARKDOWN.items():
        if name == "weight_error":
            shown |= engines
        if name in names:
            shown[name] = column
    return shown


def _cell(row: dict[Any, Any], name: str, write: Callable[[Any], str]) -> str:
    """A value as it is written; the quality of several seeds with its range."""
    value = row[name]
    if pd.isna(value):
        return ""
    if name not in _QUALITY or row.get("seeds", 1) == 1:
        return write(value)
    return f"{write(value)} ({write(row[f'{name}_low'])} to {write(row[f'{name}_high'])})"


def _markdown(frame: pd.DataFrame) -> str:
    models = frame[~frame["recipe"].isin([measures.baseline for measures in MEASURES.values()])]
    tasks = [MEASURES[task] for task in models["task"].unique()]
    shown = {f"validation_{task.curve.column}" for task in tasks} | {m.column for task in tasks for m in task.points}
    columns_of = {name: column for name, column in _shown(frame).items() if (name not in _QUALITY or name in shown)
                  and (name not in _SHOWN_IF_VARIED or models[name].nunique(dropna=False) > 1)
                  and (name not in _SHOWN_IF_KNOWN or models[name].notna().any())}  # fmt: skip
    columns = []
    for name, (heading, write) in columns_of.items():
        cells = [heading, *(_cell(row, name, write) for row in frame.to_dict("records"))]
        width = max(map(len, cells))
        is_text = name in _TEXT
        rule = "-" * width if is_text else "-" * (width - 1) + ":"
        aligned = [cell.ljust(width) if is_text else cell.rjust(width) for cell in cells]
        columns.append([aligned[0], rule, *aligned[1:]])
    return "".join(f"| {' | '.join(row)} |\n" for row in zip(*columns, strict=True))
