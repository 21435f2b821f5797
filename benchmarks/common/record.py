"""A benchmark's options, the conditions it runs under, and the record and table it leaves."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train_then_compress.config import ConfigError
from train_then_compress.cost import machine
from train_then_compress.data.corpora import CorpusError
from train_then_compress.data.prepare import Tokenized
from train_then_compress.records import Busy, write_json

Record = dict[str, Any]

_CALIBRATION_SECONDS = 2.0
#: Say where things are, not what is measured: left out of the recorded command and settings.
_PLACES = ("cache", "json", "text", "pairs", "point", "draft")
_PACKAGES = (
    "train-then-compress", "ve-fairseq", "fairseq-fixed", "transformers", "accelerate", "ctranslate2", "onnxruntime",
    "sacrebleu",
)  # fmt: skip


class Unmeasured(RuntimeError):
    """A party of a benchmark has failed; the message says which and how."""


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest settings: shows that it works, measures nothing")
    parser.add_argument("--threads", type=int, default=0, help="default: every core this process may use")
    parser.add_argument("--cache", default="cache", help="where prepared corpora are kept")
    parser.add_argument("--not-alone", action="store_true", help="run beside others; the timings then mean little")
    parser.add_argument("--json", type=Path, help="where to write the record; the table goes beside it as .md")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], quick: Record, needs: Iterable[str]) -> Any:
    """The arguments; with ``--quick`` what ``quick`` says are the defaults. Ends where a package it ``needs`` lacks."""
    if "--quick" in argv:
        parser.set_defaults(**quick)
    arguments = parser.parse_args(argv)
    arguments.threads = arguments.threads or len(machine.usable_cores())
    for package in needs:
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install -c constraints.txt -e '.[dev]'")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    return arguments


def conduct(
    script: str,
    argv: Sequence[str],
    arguments: Any,
    conventions: dict[str, str],
    measure: Callable[[Any, dict[str, float]], Record],
    table: Callable[[Record], str],
) -> Record:
    """Hold the machine, calibrate, measure, calibrate again; print the table, write the record; the record.

    ``measure`` gives the benchmark's own part of the record from the arguments and the first calibration, ``table``
    Markdown from the record.
    """
    device = getattr(arguments, "device", "cpu")
    torch.set_num_threads(arguments.threads)
    with nullcontext() if arguments.not_alone else machine.held(device, exclusive=True):
        before = machine.calibrate(device, _seconds(arguments))
        measured = measure(arguments, before)
        after = machine.calibrate(device, _seconds(arguments))
    settings = {name: value for name, value in vars(arguments).items() if name not in (*_PLACES, "not_alone")}
    record: Record = {
        "benchmark": Path(script).stem, "command": command(script, argv),
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "settings": settings, "conventions": conventions,
        "machine": machine.identity() | {"threads": arguments.threads, "alone": not arguments.not_alone},
        "versions": found_versions(), "calibration": {"before": before, "after": after}, **measured,
    }  # fmt: skip
    text = f"{table(record)}\n\n{conditions(record)}\n"
    print(text, end="")
    if arguments.json:
        write_json(arguments.json, record)
        arguments.json.with_suffix(".md").write_text(text)
    return record


def _seconds(arguments: Any) -> float:
    return _CALIBRATION_SECONDS / (20 if arguments.quick else 1)


def run(main: Callable[[Sequence[str]], Record]) -> None:
    """A script's main program: errors that a user can do something about are said in one line."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no party outlives it
    try:
        main(sys.argv[1:])
    except (Busy, ConfigError, CorpusError, Unmeasured) as error:
        sys.exit(f"error: {error}")


def peaks(record: Record) -> dict[str, float]:
    """FLOP/s of a matrix multiplication by dtype: the faster of the calibrations before and after."""
    before, after = (record["calibration"][when] for when in ("before", "after"))
    return {dtype: max(speed, after[dtype]) for dtype, speed in before.items()}


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 25 % and 75 % quantile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "q25": float(low), "q75": float(high)}


def spread(values: dict[str, float], form: str = ",.0f") -> str:
    """``median (q25 - q75)``."""
    return f"{values['median']:{form}} ({values['q25']:{form}} - {values['q75']:{form}})"


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The k of ``cost = c * value ** k`` that fits best in logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(record: Record) -> str:
    """The lines below a table: machine, calibration, versions, command."""
    calibration = "; ".join(
        f"{dtype} " + ", ".join(f"{record['calibration'][when][dtype] / 1e9:,.0f}" for when in ("before", "after"))
        for dtype in record["calibration"]["before"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    beside = "" if record["machine"]["alone"] else "; run beside others"
    return "\n".join([
        f"{record['machine']['cpu']}, {record['machine']['threads']} threads{beside}; GFLOP/s of a 1024^3 matrix "
        f"multiplication before and after: {calibration}; {versions}", f"`{record['command']}`",
    ])  # fmt: skip


def corpus_facts(prepared: Tokenized) -> Record:
    """What a record says of its text."""
    return {name: prepared.record[name] for name in ("corpus", "id", "vocab_size", "sources", "licence")}


def found_versions() -> dict[str, str]:
    """What computes the results, as far as it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command(script: str, argv: Sequence[str]) -> str:
    """The command that repeats the measurement, without the places of its files."""
    kept, words = [], iter(argv)
    for word in words:
        if word in (f"--{place}" for place in _PLACES):
            next(words)
        elif not word.startswith(tuple(f"--{place}=" for place in _PLACES)):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *kept])
