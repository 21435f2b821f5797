"""Where the time of a training step goes: matrix multiplications, attention, everything else.

python benchmarks/step_profile.py --tasks masked_lm --shapes 1x64 2x64 --json step_profile.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatchcase

import masked_lm_training
import translation_training
from common import contest
from common import record as common
from common.contest import FAIRSEQ_MODEL, OURS, program
from common.record import Record, Unmeasured

from train_then_compress.config import Config
from train_then_compress.sweep import environment

CONVENTIONS = {
    "seconds": "of one training step of `training.fit`, without the profiler, median (quartiles) over rounds",
    "operations": "torch's profiler: own seconds of each operation on the main thread, which waits for the others, and "
    "calls, means a step, where they are more than 0.1 % of it; `profiled_seconds`: of a step under it",
    "share": "of a profiled step; outside operations: batches, Python, autograd and dispatch",
    "attention": "PyTorch's fused kernel, its multiplications, softmax and all; where it is not used, the "
    "multiplications count as such",
    "settings": "those of masked_lm_training.py and translation_training.py",
}
TASKS = {"masked_lm": masked_lm_training, "translation": translation_training}
SHAPES = ("1x64", "2x64", "2x128", "6x256")
#: Kinds of operations, by patterns of their names.
KINDS = {
    "matrix multiplications": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear*"),
    "attention kernel": ("_scaled_dot_product_*_attention*",),
    "softmax, loss": ("*softmax*", "nll_loss*", "exp", "exp_", "amax", "gather", "scatter_add_"),
    "norm": ("native_layer_norm*",),
    "activation": ("gelu*", "relu*", "clamp_min*", "threshold_backward"),
    "random numbers": ("random_", "bernoulli_"),
    "optimizer": ("_fused_adamw_", "linalg_vector_norm", "_foreach*"),
    "copies, fills": ("copy_", "cat", "fill_"),
}
OTHER, OUTSIDE = "other operations", "outside operations"
_LEAST_SHARE = 0.001
_PARTIES = {OURS: "ours", FAIRSEQ_MODEL: "fairseq_model"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = contest.options(__doc__, SHAPES, dropout=None)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=10, help="in a turn with or without the profiler; default 10")
    parser.add_argument("--text", help="as in masked_lm_training.py")
    parser.add_argument("--pairs", help="as in translation_training.py")
    parser.set_defaults(rounds=3)
    arguments = contest.parse(parser, argv, {"steps": 2})
    if arguments.device != "cpu":
        parser.error(f"--device {arguments.device}: the seconds of operations are those of a CPU")
    return arguments


def kind(operation: str) -> str:
    """Of an operation as torch's profiler names it."""
    space, _, name = operation.partition("::")
    if space != "aten":
        return OUTSIDE
    patterns = ((kind, pattern) for kind, patterns in KINDS.items() for pattern in patterns)
    return next((kind for kind, pattern in patterns if fnmatchcase(name, pattern)), OTHER)


def configs_of(arguments: argparse.Namespace, task: str) -> dict[str, Config]:
    """By shape: what the task's own benchmark trains, changed where the command line says so."""
    theirs = vars(TASKS[task].parse(["--quick"] if arguments.quick else []))
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return {shape: TASKS[task].config_of(argparse.Namespace(**theirs | given), shape) for shape in arguments.shapes}


def observe(party: str, config: Config, arguments: argparse.Namespace) -> Record:
    """Profile a party in a process of its own."""
    values, threads = json.dumps(dataclasses.asdict(config)), config.runtime.threads
    command, _, environ = program("profiled", _PARTIES[party], values, arguments.steps, environment(threads))
    done = subprocess.run([*command, str(arguments.rounds)], env=os.environ | environ, capture_output=True, text=True)
    if done.returncode:
        raise Unmeasured(f"{party} has ended early, with status {done.returncode}:\n{done.stderr[-2000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    kinds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for operation, (seconds, _) in seen["operations"].items():
        if (found := kind(operation)) != OUTSIDE:
            kinds[found] += seconds
    profiled = statistics.fmean(seen["profiled_seconds"])
    shares = {name: seconds / profiled for name, seconds in kinds.items()}
    large = {name: own for name, own in seen["operations"].items() if own[0] > _LEAST_SHARE * profiled}
    return seen | {"operations": large, "share": shares | {OUTSIDE: 1 - sum(shares.values())}}


def measure(arguments: argparse.Namespace, calibration: dict[str, float]) -> Record:
    """Every task, shape and party, one after the other."""
    found: Record = {}
    for task in arguments.tasks:
        for shape, config in configs_of(arguments, task).items():
            found.setdefault(task, {})[shape] = {party: observe(party, config, arguments) for party in _PARTIES}
    return {"steps": found}


def table(record: Record) -> str:
    """A row for each task, shape and party."""
    rows = []
    for task, shapes in record["steps"].items():
        for shape, parties in shapes.items():
            for party, seen in parties.items():
                milliseconds = common.quartiles([1e3 * seconds for seconds in seen["seconds"]])
                shares = [f"{share:.0%}" for share in seen["share"].values()]
                rows.append([task, shape, party, common.spread(milliseconds, ",.1f"), *shares])
    heading = ["task", "shape", "party", "ms a step, median (quartiles)", *KINDS, OTHER, OUTSIDE]
    return common.markdown(heading, rows)


def main(argv: Sequence[str]) -> Record:
    """Measure, print the table, write the record; returns it."""
    return common.conduct(__file__, argv, parse(argv), CONVENTIONS, measure, table)


if __name__ == "__main__":
    common.run(main)
