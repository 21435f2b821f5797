"""Growth: what a training step costs against depth, width, length, batch and processes, beside what FLOPs expect.

python benchmarks/growth.py --json growth.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import record as common
from common.record import Record
from parties.loops import trainer_of

from train_then_compress.config import Config
from train_then_compress.cost import machine
from train_then_compress.data.prepare import Prepared, prepare
from train_then_compress.sweep import environment
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.training import parallel

CONVENTIONS = {
    "seconds": "of one training step of the masked LM by its budget clock, median (quartiles) over all rounds, in "
    "which all points take turns",
    "exponent": "slope of the logarithm of the cost against that of what grows, least squares over the points",
    "expected": "the same slope of the FLOPs of cost/flops.py: what a machine would show that multiplies matrices of "
    "every size at one speed and does nothing else",
    "processes": "share the batch and the threads",
}
#: What grows from the base model, and how far.
BASE = {"depth": 4, "width": 256, "length": 128, "batch": 16, "processes": 1}
GROWTH = {
    "depth": [1, 2, 4, 8, 16], "width": [64, 128, 256, 512], "length": [64, 128, 256, 512, 1024],
    "batch": [2, 4, 8, 16, 32], "processes": [1, 2],
}  # fmt: skip
_QUICK = {"depth": [1, 2], "width": [16, 32], "length": [16, 32], "batch": [2, 4], "processes": [1, 2]}


#: Batches whose FLOPs are counted for a step's.
_SAMPLE = 100


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = common.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each point; default 5")
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="length of a turn; default 1")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16" if machine.cpu_has_bf16() else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--text", help="file, folder or glob of text to train on (default: the corpus sotu_wiki)")
    arguments = common.parse(parser, argv, {"rounds": 1, "turn_seconds": 0.01}, needs=())
    arguments.growth = _QUICK if arguments.quick else GROWTH
    arguments.base = {name: values[0] for name, values in _QUICK.items()} if arguments.quick else BASE
    return arguments


def config_of(arguments: argparse.Namespace, point: dict[str, int]) -> Config:
    """The config of a point."""
    corpus = {"name": "text_files", "train": arguments.text} if arguments.text else {"name": "sotu_wiki"}
    processes = point["processes"]
    return Config.build({
        "model": {"depth": point["depth"], "width": point["width"], "head_size": min(64, point["width"])},
        "data": corpus | {"sequence_length": point["length"]}, "optimizer": {"batch_size": point["batch"]},
        "runtime": {"device": arguments.device, "dtype": arguments.dtype, "processes": processes,
                    "threads": max(1, arguments.threads // processes)},
        "budget": {"kind": "steps", "value": 1_000_000_000},
    })  # fmt: skip


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """Every point of every line of growth, in turns."""
    points = {tuple((arguments.base | {grown: value}).items()) for grown, values in arguments.growth.items()
              for value in values}  # fmt: skip
    configs = {point: config_of(arguments, dict(point)) for point in sorted(points)}
    prepared = prepare(next(iter(configs.values())).data, Path(arguments.cache))
    taken: dict[Any, list[float]] = {point: [] for point in configs}
    for _ in range(arguments.rounds):
        for point, config in configs.items():
            take = _turn if config.runtime.processes == 1 else _turn_together
            taken[point] += take(config, prepared, arguments.turn_seconds)
    flops = {point: _flops(config, prepared) for point, config in configs.items()}
    lines = {}
    for grown, values in arguments.growth.items():
        rows = []
        for value in values:
            point = tuple((arguments.base | {grown: value}).items())
            rows.append({grown: value, "seconds": common.quartiles(taken[point]), "flops": flops[point]})
        fitted = {key: common.exponent(values, costs) for key, costs in (
            ("seconds", [row["seconds"]["median"] for row in rows]), ("flops", [row["flops"] for row in rows]),
        )}  # fmt: skip
        lines[grown] = {"points": rows, "exponent": fitted["seconds"], "expected": fitted["flops"]}
    return {"growth_of": lines}


def _flops(config: Config, prepared: Prepared) -> float:
    """Of a step, the mean over the first batches: steps differ in the number of their predictions."""
    task = MaskedLMTask(config, prepared, config.seed)
    return sum(task.counts(task.batch(step)).flops for step in range(_SAMPLE)) / _SAMPLE


def _turn(config: Config, prepared: Prepared, seconds: float) -> list[float]:
    """Seconds of each step of a new model, for a while after it has warmed up."""
    task = MaskedLMTask(config, prepared, config.seed)
    trainer, steps = trainer_of(task.new_model(), task, config), []
    trainer.warm_up()
    start = time.perf_counter()
    while not steps or parallel.largest_over_ranks([time.perf_counter() - start])[0] < seconds:
        before = trainer.clock.seconds
        trainer.step()
        steps.append(trainer.clock.seconds - before)
    return steps


def _turn_together(config: Config, prepared: Prepared, seconds: float) -> list[float]:
    """The same in several processes."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        arguments = (config, prepared, seconds, place)
        torch.multiprocessing.spawn(_be_rank, arguments, config.runtime.processes)  # type: ignore[no-untyped-call]
        return [float(step) for step in json.loads((place / "steps.json").read_text())]


def _be_rank(rank: int, config: Config, prepared: Prepared, seconds: float, place: Path) -> None:
    torch.set_num_threads(config.runtime.threads)
    meet = f"file://{place / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=config.runtime.processes)
    steps = _turn(config, prepared, seconds)
    if rank == 0:
        (place / "steps.json").write_text(json.dumps(steps))
    dist.destroy_process_group()


def table(record: Record) -> str:
    """A row for each point, and one for each line of growth."""
    rows, fits, peaks = [], [], common.peaks(record)
    dtype = record["settings"]["dtype"]
    peak = peaks.get(dtype, peaks["fp32"])
    for grown, line in record["growth_of"].items():
        for point in line["points"]:
            speed = point["flops"] / point["seconds"]["median"]
            milliseconds = {name: 1e3 * value for name, value in point["seconds"].items()}
            share = speed / peak
            rows.append([f"{grown} {point[grown]}", common.spread(milliseconds, ",.2f"), f"{share:.1%}"])
        fits.append([grown, f"{line['exponent']:.2f}", f"{line['expected']:.2f}"])
    base = ", ".join(f"{name} {value}" for name, value in record["settings"]["base"].items())
    return "\n\n".join([
        common.markdown(["grows", "exponent", "expected of FLOPs"], fits),
        common.markdown(["point", "ms a step, median (quartiles)", "of the matmul peak"], rows),
        f"from {base}; {dtype}",
    ])  # fmt: skip


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    # The C library reads what it is told of memory once, at the start of a process.
    told = environment(len(machine.usable_cores()))
    if not told.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], told)
    common.run(main)
