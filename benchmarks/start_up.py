"""Start-up: how long one waits for help, for the first training step, for a finished sweep, for table and figures.

python benchmarks/start_up.py --json start_up.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import record as common
from common.record import Record, Unmeasured

from train_then_compress import sweep
from train_then_compress.cell import Cell, locate
from train_then_compress.data.prepare import Prepared
from train_then_compress.records import rewrite_rows, write_json

CONVENTIONS = {
    "seconds": "of wall clock, from before the command's process starts; median (quartiles) of the rounds",
    "first step": "until the row of the first training step of a 2x128 model stands in metrics.jsonl, the corpus being "
    "prepared; not compiled",
    "finished sweep": "runs whose records stand, with made-up results, given again",
    "points": "table and figures read the same runs",
}
_TTC = [sys.executable, "-m", "train_then_compress"]
_SWEEP = ["-m", "study=finished", "+scale=cpu", "budget.value=60",
          "recipes=[none,quant4,prune30,prune60,prune30+quant4]"]  # fmt: skip
_RECIPES = 5
_FIRST = ["study=first", "+scale=cpu", "model.depth=2", "model.width=128", "budget=steps", "budget.value=100"]
_WAIT = 120.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="each thing so often; default 7")
    parser.add_argument("--depths", default="1,2,3,4,6", help="of the finished runs")
    parser.add_argument("--widths", default="64,128,192,256")
    parser.add_argument("--seeds", type=int, default=10, help="of each shape; default 10, in all 200 runs")
    parser.add_argument("--text", help="file, folder or glob of text to train on (default: the corpus sotu_wiki)")
    return common.parse(parser, argv, {"rounds": 1, "depths": "1,2", "widths": "64,128", "seeds": 2}, needs=())


def overrides(arguments: argparse.Namespace, runs: Path) -> list[str]:
    """What all commands are given."""
    text = ["data=text_files", f"data.train={arguments.text}"] if arguments.text else []
    return [*text, f"paths.runs={runs}", f"paths.cache={arguments.cache}", f"runtime.threads={arguments.threads}"]


def fabricate(given: list[str]) -> int:
    """Leave the records of every run of a sweep as if it had been done, with made-up results; the number of points."""
    configs, errors = sweep.compose(given)
    if errors:
        raise Unmeasured("\n".join(errors))
    known: dict[str, Prepared] = {}
    for number, config in enumerate(configs):
        _finish(locate(config, known), quality=1 / (config.model.depth * config.model.width + number % 7))
    return len(configs) * _RECIPES


def _finish(cell: Cell, quality: float) -> None:
    directory, key = cell.directory, cell.plan.dense
    perplexity = cell.data.record["unigram_perplexity"]["valid"] * (0.1 + 10 * quality)
    directory.write_config(cell.config)
    rows: list[dict[str, Any]] = []
    for number in range(1, 101):
        row: dict[str, Any] = {"stage": key.directory, "progress": number / 100, "lr": 1e-3, "tokens_per_second": 5e4}
        row |= {"seconds": 0.6 * number, "flops": 1e10 * number, "tokens": 1000 * number, "steps": number, "loss": 5.0}
        rows.append(row | {"split": "train"})
        if number % 8 == 4:
            now = perplexity * (100 / number) ** 0.5
            rows.append(row | {"split": "validation", "perplexity": now, "accuracy": 0.3})
    rewrite_rows(directory.metrics, rows)
    clock = {"seconds": 60.0, "flops": 1e12, "tokens": 10**5, "steps": 100}
    validation = {"loss": 5.0, "perplexity": perplexity, "accuracy": 0.3}
    write_json(directory.stage(key) / "record.json", {
        "stage": key.name, "id": key.id, "clock": clock, "validation": validation, "corpus": cell.data.record,
    })  # fmt: skip
    points = []
    for number, (recipe, point) in enumerate(cell.plan.points.items(), 1):
        sizes = dict.fromkeys(
            ("bytes", "bytes_bf16", "bytes_fp32", "nonzero", "parameters"), round(1e5 / quality / number)
        )
        points.append({
            "point": point, "recipe": recipe, "stage": key.directory, "test_loss": 5.0, "test_accuracy": 0.3,
            "test_perplexity": perplexity * (1 + 0.02 * number), **sizes, "latency_ms": 3.0, "latency_iqr_ms": 0.1,
            "throughput": 1e4,
        })  # fmt: skip
    rewrite_rows(directory.path / "points.jsonl", points)
    write_json(directory.path / "result.json", {"points": cell.plan.points})


def ended(*arguments: str) -> float:
    """Seconds until a command has ended well."""
    start = time.perf_counter()
    done = subprocess.run([*_TTC, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise Unmeasured(f"ttc {' '.join(arguments)} failed:\n{done.stderr}")
    return seconds


def first_step(given: list[str]) -> float:
    """Seconds until a run of its own, which is then stopped, has taken its first step."""
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        command = [*_TTC, "run", *_FIRST, *given, f"paths.runs={runs}"]
        # The run holds a machine of its own making: this one is held for the benchmark already.
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": runs}, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)  # fmt: skip
        try:
            while not any(path.stat().st_size for path in Path(runs).glob("first/*/metrics.jsonl")):
                if process.poll() is not None or time.perf_counter() - start > _WAIT:
                    raise Unmeasured("ttc run took no step" + (f":\n{process.stdout.read()}" if process.stdout else ""))
                time.sleep(0.002)
            return time.perf_counter() - start
        finally:
            process.terminate()
            process.communicate()


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """Make the finished sweep, then all things in turn."""
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory)
        shapes = [f"model.depth={arguments.depths}", f"model.width={arguments.widths}"]
        seeds = f"seed={','.join(map(str, range(arguments.seeds)))}"
        given = overrides(arguments, runs)
        finished = [*_SWEEP, *shapes, seeds, *given]
        points = fabricate(finished)
        count = points // _RECIPES
        things: dict[str, Callable[[], float]] = {
            "ttc --help": lambda: ended("--help"),
            "ttc run, to the first step": lambda: first_step(given),
            f"ttc run, {count} finished runs": lambda: ended("run", *finished),
            f"ttc table, {points} points": lambda: ended("table", "finished", "--runs", directory),
            f"ttc figures, {points} points": lambda: ended("figures", "finished", "--runs", directory),
        }
        seconds: dict[str, list[float]] = {name: [] for name in things}
        for _, (name, take) in itertools.product(range(arguments.rounds), things.items()):
            seconds[name].append(take())
    facts = {name: {"by_round": values, **common.quartiles(values)} for name, values in seconds.items()}
    return {"runs": count, "points": points, "seconds": facts}


def table(record: Record) -> str:
    """A row for each thing."""
    rows = [[name, common.spread(facts, ".2f")] for name, facts in record["seconds"].items()]
    sweep_of = next(facts for name, facts in record["seconds"].items() if "finished" in name)
    each = f"the finished sweep costs {sweep_of['median'] / record['runs']:.3f} s a run"
    return f"{common.markdown(['command', 'seconds, median (quartiles)'], rows)}\n\n{each}"


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
